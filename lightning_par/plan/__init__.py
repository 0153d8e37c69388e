"""From what the dry run saw and what the user asked for to frozen data: what is split how, what runs where."""

from lightning_par.plan.build import build_plan
from lightning_par.plan.override import Overrides
from lightning_par.plan.plan import ChainPlan, LayerPlan, ParameterPlan, Plan, StagePlan
from lightning_par.plan.render import render_plan

__all__ = ["ChainPlan", "LayerPlan", "Overrides", "ParameterPlan", "Plan", "StagePlan", "build_plan", "render_plan"]
