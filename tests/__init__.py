"""Tests. What the environment must say before torch and DeepSpeed are imported is said here."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", os.environ.get("LIGHTNING_PAR_TEST_DEVICE", "cpu"))
if os.environ["DS_ACCELERATOR"] == "cuda":  # only the ranks see the GPU: a process that has used CUDA cannot fork
    os.environ.update(PYTORCH_NVML_BASED_CUDA_CHECK="1", CUDA_VISIBLE_DEVICES="")
