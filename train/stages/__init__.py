"""Stages by kind. The class is imported when a recipe asks for it, so `--list` needs no diffusers."""

from __future__ import annotations

import importlib

from dcgen.fields import shown
from train.config import RecipeError, nearest
from train.stages.base import Stage

STAGES: dict[str, str] = {
    "synthesize": "train.stages.synthesize:SynthesizeStage",
    "cache": "train.stages.cache:CacheStage",
    "align": "train.stages.align:AlignStage",
    "head": "train.stages.head:HeadStage",
    "finetune": "train.stages.finetune:FinetuneStage",
    "tiny": "train.stages.tiny:TinyStage",
    "export": "train.stages.export:ExportStage",
    "gap": "train.stages.gap:GapStage",
    "ae-align": "train.stages.ae_align:AEAlignStage",
    "autoencoder": "train.stages.autoencoder:AutoencoderStage",
    "evaluator": "train.stages.evaluator:EvaluatorStage",
    "text": "train.stages.text:TextStage",
    "labels": "train.stages.labels:LabelsStage",
    "pretrain": "train.stages.pretrain:PretrainStage",
    "distill": "train.stages.distill:DistillStage",
}


def stage_class(kind: str, where: str = "recipe") -> type[Stage]:
    """The Stage subclass of a kind; an unknown kind is a RecipeError which lists the valid ones."""
    if not isinstance(kind, str) or kind not in STAGES:
        raise RecipeError(f"{where}: unknown kind {shown(kind)}{nearest(str(kind)[:100], STAGES)}")
    module, name = STAGES[kind].split(":")
    return getattr(importlib.import_module(module), name)
