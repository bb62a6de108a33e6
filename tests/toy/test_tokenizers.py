"""The toy's tokenizers: every caption word is one token, nothing is unknown, all load again from disk."""

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from train.families.sana import sana_instruction
from train.files import read_json
from train.toy.pictures import ToyPictures
from train.toy.tokenizers import (
    CLIP_TOKENS,
    T5_TOKENS,
    bpe_merges,
    save_clip_tokenizer,
    save_gemma_tokenizer,
    save_t5_tokenizer,
)

INSTRUCTION = "Given a prompt, write it anew:\n- with Details.\nUser Prompt: "
CAPTIONS = ["robot on a blue background", "dog face on a red background", "boat on a green background"]


def test_merges_make_each_word_one_symbol_most_frequent_pair_first():
    merges = bpe_merges(["aab", "aab", "cb"])
    assert merges[0] == ("a", "a")  # twice, like (aa, b</w>) later; the tie is alphabetical
    symbols = {"".join(pair) for pair in merges}
    assert {"aab</w>", "cb</w>"} <= symbols


def test_clip_tokenizer_survives_the_disk(tmp_path):
    from transformers import CLIPTokenizer

    made = save_clip_tokenizer(CAPTIONS, tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for caption in CAPTIONS:
        ids = loaded(caption).input_ids
        assert ids == made(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert loaded.decode(ids[1:-1]).strip() == caption
    assert loaded("").input_ids == [loaded.bos_token_id, loaded.eos_token_id]
    assert loaded.eos_token_id == len(loaded) - 1  # the pooled token is found by its id, the highest
    assert loaded.model_max_length == CLIP_TOKENS
    unseen = loaded("Zebra 7!").input_ids[1:-1]
    assert loaded.eos_token_id not in unseen  # which is also CLIP's unknown token
    assert loaded.decode(unseen).replace(" ", "") == "zebra7!"


def test_t5_tokenizer_survives_the_disk(tmp_path):
    from transformers import T5TokenizerFast

    made = save_t5_tokenizer(CAPTIONS, tmp_path)
    loaded = T5TokenizerFast.from_pretrained(tmp_path)
    for caption in CAPTIONS:
        ids = loaded(caption).input_ids
        assert ids == made(caption).input_ids
        assert len(ids) == len(caption.split()) + 1
        assert ids[-1] == 1
    padded = loaded(CAPTIONS[0], padding="max_length", max_length=loaded.model_max_length).input_ids
    assert len(padded) == T5_TOKENS
    assert padded[-1] == 0
    assert 2 not in loaded("Zebra 7!").input_ids
    assert loaded("").input_ids == [1]


def save_gemma(captions, folder):
    return save_gemma_tokenizer(captions, INSTRUCTION, folder)


def test_gemma_tokenizer_survives_the_disk(tmp_path):
    from transformers import PreTrainedTokenizerFast

    made = save_gemma(CAPTIONS, tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    instruction = loaded(INSTRUCTION).input_ids
    assert instruction == made(INSTRUCTION).input_ids
    for caption in CAPTIONS:
        ids = loaded(caption).input_ids
        assert ids[0] == loaded.bos_token_id
        assert len(ids) == len(caption.split()) + 1
        # SANA cuts the instruction off by its length: of the last token before the prompt nothing may be left over.
        assert loaded(INSTRUCTION + caption).input_ids == [*instruction[:-1], *ids[1:]]
    assert loaded("").input_ids == [loaded.bos_token_id]
    assert loaded.decode(loaded("Robot ON A").input_ids[1:]) == "robot on a"
    assert loaded.unk_token_id not in [*loaded("Zebra 7!").input_ids, *instruction]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("save", [save_clip_tokenizer, save_t5_tokenizer, save_gemma])
def test_the_same_captions_make_the_same_files(save, tmp_path):
    for name in ("one", "two"):
        save(CAPTIONS, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("save", "folder"),
    [
        (save_clip_tokenizer, "flux-base/tokenizer"),
        (save_t5_tokenizer, "flux-base/tokenizer_2"),
        (lambda texts, out: save_gemma_tokenizer(texts, "\n".join(sana_instruction()), out), "sana-base/tokenizer"),
    ],
    ids=["clip", "t5", "gemma"],
)
def test_what_is_shipped_is_what_is_made_and_what_every_transformers_reads(save, folder, root, tmp_path):
    pictures, shipped = ToyPictures(root / "toy" / "data"), root / "toy" / folder
    captions = [pictures.caption(pair) for pair in pictures.pairs("train")]
    made = save(captions, tmp_path)
    config = read_json(shipped / "tokenizer_config.json")
    assert config == read_json(tmp_path / "tokenizer_config.json")
    loaded = AutoTokenizer.from_pretrained(shipped)
    texts = [*captions, "", "Zebra 7! \N{ROBOT FACE}", "two   spaces\n and a line"]
    assert loaded(texts).input_ids == made(texts).input_ids
    assert len(loaded) == len(made)
    # A release of transformers later than 4.50, which ComfyUI allows, must not be needed to know a name.
    assert config["tokenizer_class"] in {"CLIPTokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast"}
    assert not {"backend", "extra_special_tokens"} & config.keys()


def test_clip_has_the_names_that_every_transformers_reads(root):
    with safe_open(root / "toy/flux-base/text_encoder/model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118 - no mapping
