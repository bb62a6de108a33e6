"""Stages by kind. train.config imports a class when a recipe asks for it, so `--list` needs no diffusers."""

from __future__ import annotations

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
    "few-steps": "train.stages.few_steps:FewStepsStage",
}
