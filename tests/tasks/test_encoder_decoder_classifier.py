"""Encoder-decoder classifiers: BART and T5, each with adapters, a linear probe and full fine-tuning."""

from __future__ import annotations

import pytest
import torch

from peft_recipes import RecipeError, plan, train
from peft_recipes.adapters.merge import merge_adapter
from peft_recipes.inference.predict import Predictor


@pytest.fixture
def ending(tiny, tmp_path):
    """ending(kind) -> a base whose tokenizer ends each text with the end token, as BART's and T5's do."""
    from small import tokenizer
    from tokenizers import processors

    def make(kind):
        import shutil

        folder = tmp_path / kind
        shutil.copytree(tiny(kind), folder)
        words = tokenizer()
        words._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
        )
        words.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_classifies(classify, ending, tmp_path, kind):
    recipe = classify(kind, model=str(ending(kind)))
    planned = plan(recipe)
    for arm in recipe.arms:
        run = train(recipe, arm, output=tmp_path)
        assert run.ok and not run.failed_checks, (arm, run.failed_checks)
        assert run.data["parameters"]["trainable"] == planned["arms"][arm]["trainable_parameters"]
    folder = tmp_path / "tiny" / "lora" / "seed-0"
    found = Predictor(folder).texts(["a bright lovely warm film", "sad"])
    assert {each["label"] for each in found} <= {"good", "bad"}
    merge_adapter(folder, tmp_path / "merged")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "merged")("sad", return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits.softmax(-1)[0]
    assert max(probabilities).item() == pytest.approx(found[1]["probability"], abs=1e-4)


@pytest.mark.parametrize("kind", ["mbart", "umt5"])
def test_other_encoder_decoders_classify(classify, ending, tmp_path, kind):
    import transformers
    from peft import LoraConfig
    from small import tiny_config

    from peft_recipes import Arm

    folder = ending("bart" if kind == "mbart" else "t5")
    known = tiny_config("bart" if kind == "mbart" else "t5", 60).to_dict()
    config = {"mbart": transformers.MBartConfig, "umt5": transformers.UMT5Config}[kind]
    config = config(**{k: v for k, v in known.items() if k not in ("model_type", "architectures", "vocab_size")},
                    vocab_size=60)  # fmt: skip
    transformers.set_seed(0)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    arms = {"lora": Arm(LoraConfig(r=2, target_modules="all-linear"), learning_rate=1e-2)}
    run = train(classify("bart", model=str(folder), arms=arms), "lora", output=tmp_path)
    assert run.ok and not run.failed_checks, run.failed_checks


def test_a_tokenizer_that_ends_no_text_is_refused_at_the_start(classify):
    with pytest.raises(RecipeError, match="end token"):
        plan(classify("bart"))
