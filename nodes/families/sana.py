"""SANA's prompt encoding."""

from __future__ import annotations

from comfy_api.latest import io

from ..bridge.families.sana import text as sana_text
from ..model import CATEGORY
from ..schema import schema


class DCGenSanaTextEncode(io.ComfyNode):
    """Encodes a prompt for SANA and DC-Gen-SANA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenSanaTextEncode",
            search_aliases=["clip text encode", "prompt", "gemma"],
            display_name="SANA Text Encode (DC-Gen)",
            category=CATEGORY,
            description="Encodes a prompt as in SANA's training: Gemma's last layer after its norm, the instruction "
            "before positive prompts, 300 positions and their mask.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Gemma-2-2B-it: from Load Release (DC-Gen), or from Load CLIP with type lumina2 (a file of "
                    "the -it model, not the base one that Lumina uses).",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. Upper case makes no difference and weights such as (word:1.2) have no effect. "
                    "The negative prompt is usually empty.",
                ),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default=sana_text.INSTRUCTION,
                    optional=True,
                    tooltip="Text that Gemma reads before the prompt; empty for none. The default is the one SANA was "
                    "trained with. Ignored when `negative` is on.",
                ),
                io.Boolean.Input(
                    "negative",
                    default=False,
                    optional=True,
                    tooltip="On for the negative prompt, which SANA encodes without the instruction.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, clip, text: str, instruction: str = sana_text.INSTRUCTION, negative: bool = False
    ) -> io.NodeOutput:
        return io.NodeOutput(sana_text.encode(clip, text, "" if negative else instruction))


NODES = [DCGenSanaTextEncode]
