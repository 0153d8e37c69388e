"""The configs of train.py; a package so that Hydra finds them as pkg://lightning_par.conf."""
