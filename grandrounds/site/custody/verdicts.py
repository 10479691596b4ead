"""The site's verdict on every key of a run's configuration.

A key is bounded or listed by `[policy]` or `[privacy]` of site.toml, replaced by the site's own
value, fixed by the software itself, or harmless to the site for a stated reason. A key without a
verdict fails a test; a key that the software does not know is refused.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What the site does with a run's value of one key."""

    kind: str
    """`bounded`, `listed`, `private`, `own`, `fixed`, `approved` or `harmless`."""
    by: tuple[str, ...] = ()
    """Keys of `[policy]` that bound or list it; of `[privacy]` where it is `private`."""
    why: str = ""
    """Why the value needs no bound."""


def _bounded(*by: str) -> Verdict:
    return Verdict("bounded", by)


def _listed(by: str) -> Verdict:
    return Verdict("listed", (by,))


def _own(why: str) -> Verdict:
    return Verdict("own", why=why)


def _harmless(why: str) -> Verdict:
    return Verdict("harmless", why=why)


def _private(*by: str) -> Verdict:
    return Verdict("private", by)


_AT_SERVER = _harmless("used by the server only; the site checks each adapter that it receives")
_LESS = _harmless("a lossy codec tells less than float32; the site checks the decoded adapter")
_SAME = _harmless("the result is the same up to rounding, and memory is checked before a visit")
_NO_EFFECT = _harmless("without effect at a site")
_ONE_VALUE = Verdict("fixed", why="the software allows one value only")
_OWN_DATA = _own("data, columns and held-out examples are those of site.toml")
_OWN_UNITS = _own("units are declared in [privacy] of site.toml")
_RATES = ("min-learning-rate", "max-learning-rate")
_SIZES = ("min-examples-per-visit", "max-examples-per-visit")
_STEP = ("min-examples-per-step", "max-batch", "max-tokens-per-batch")

VERDICTS: dict[str, Verdict] = {
    "num-server-rounds": _bounded("max-rounds"),
    "earlier-schedules": _bounded(*_RATES),
    "seed": _harmless("the site orders its examples by a secret of its own"),
    "run-directory": _AT_SERVER,
    "resume-from": _AT_SERVER,
    "consortium": _AT_SERVER,
    "secure-aggregation": _private("require"),
    "model.name": Verdict("listed", ("bases",)),
    "model.revision": _own("the site has its own copy, with the hash in its file"),
    "model.quantization": _listed("quantizations"),
    "model.dtype": _listed("dtypes"),
    "model.gradient-checkpointing": _SAME,
    "model.lora.peft-lora-r": _bounded("max-rank", "min-lora-scale", "max-lora-scale"),
    "model.lora.peft-lora-alpha": _bounded("min-lora-scale", "max-lora-scale"),
    "model.lora.use-rslora": _bounded("min-lora-scale", "max-lora-scale"),
    "model.lora.rank-pattern": _bounded("max-rank", "min-lora-scale", "max-lora-scale"),
    "model.lora.alpha-pattern": _bounded("min-lora-scale", "max-lora-scale"),
    "model.lora.target-modules": _listed("target-modules"),
    "model.lora.from-adapter": _harmless("a place on the server; the adapter counts by its hash"),
    "model.lora.from-adapter-sha256": Verdict(
        "approved",
        why="the operator must have approved the recipe, whatever the policy says",
    ),
    "model.lora.dropout": _harmless("random noise in training; the key allows at most 0.9"),
    "model.lora.peft-use-dora": _harmless(
        "one trained value more per output; the start is of the base's weights, not of the data"
    ),
    "train.save-every-round": _AT_SERVER,
    "train.learning-rate-max": _bounded(*_RATES),
    "train.learning-rate-min": _bounded(*_RATES),
    "train.seq-length": _bounded(
        "min-sequence-length",
        "max-sequence-length",
        "sequence-length-step",
        "max-tokens-per-batch",
    ),
    "train.dynamic-data-seed": _own("the site's cursor moves forward, whatever the run asks"),
    "train.objective": Verdict("fixed", why="a site with a policy trains on answers only"),
    "train.dpo-beta": _NO_EFFECT,
    "train.dpo-length-normalised": _NO_EFFECT,
    "train.dpo-reference": _NO_EFFECT,
    "train.replay-examples": _own("a site with a policy trains on its own examples alone"),
    "train.batching": _SAME,
    "train.response-only-logits": _SAME,
    "train.logits-chunk-tokens": _bounded("min-logits-chunk-tokens"),
    "train.optimizer": _listed("optimizers"),
    "train.num-threads": _own("at most one thread per core, and agent.num-threads where set"),
    "train.cpu-matmul": _SAME,
    "train.fused-kernels": _SAME,
    "train.devices": _own("at most the GPUs in the agent's view, on a CPU its cores"),
    "train.report-to": _AT_SERVER,
    "train.training-arguments.output-dir": _ONE_VALUE,
    "train.training-arguments.learning-rate": _ONE_VALUE,
    "train.training-arguments.per-device-train-batch-size": _bounded(*_STEP, *_SIZES),
    "train.training-arguments.gradient-accumulation-steps": _bounded(
        "min-examples-per-step", *_SIZES
    ),
    "train.training-arguments.num-train-epochs": _bounded("max-steps-per-visit", *_SIZES),
    "train.training-arguments.max-steps": _bounded("max-steps-per-visit", *_SIZES),
    "train.training-arguments.warmup-steps": _bounded("min-learning-rate"),
    "train.training-arguments.max-grad-norm": _bounded("min-clipping-norm"),
    "train.training-arguments.weight-decay": _bounded("max-weight-decay"),
    "train.training-arguments.lr-scheduler-type": _harmless(
        "the rate may rise before and fall after the round's; that and the first one are bounded"
    ),
    "train.training-arguments.bf16": _SAME,
    "train.training-arguments.fp16": _ONE_VALUE,
    "train.training-arguments.tf32": _SAME,
    "train.training-arguments.gradient-checkpointing": _SAME,
    "train.training-arguments.torch-compile": _own("agent.torch-compile must allow it too"),
    "train.training-arguments.logging-steps": _NO_EFFECT,
    "train.training-arguments.save-steps": _NO_EFFECT,
    "train.training-arguments.save-total-limit": _NO_EFFECT,
    "strategy.name": _listed("strategies"),
    "strategy.proximal-mu": _bounded("max-proximal-mu"),
    "strategy.fraction-train": _AT_SERVER,
    "strategy.cohorts": _AT_SERVER,
    "strategy.fraction-evaluate": _AT_SERVER,
    "strategy.min-reply-fraction": _AT_SERVER,
    "strategy.round-timeout-seconds": _AT_SERVER,
    "strategy.min-sites": _AT_SERVER,
    "strategy.connect-timeout-seconds": _AT_SERVER,
    "strategy.weighting": _AT_SERVER,
    "strategy.largest-weight": _AT_SERVER,
    "strategy.max-rank": _bounded("max-rank"),
    "strategy.site-ranks": _bounded("max-rank"),
    "strategy.rank-decay": _harmless("how many ranks a site goes on with: fewer, never more"),
    "strategy.rank-penalty": _harmless("it draws ranks towards zero, which AdamW's bound covers"),
    "strategy.ridge": _AT_SERVER,
    "strategy.outer-nesterov": _AT_SERVER,
    "strategy.server-learning-rate": _bounded("max-server-learning-rate"),
    "strategy.server-momentum": _AT_SERVER,
    "strategy.beta-1": _AT_SERVER,
    "strategy.beta-2": _AT_SERVER,
    "strategy.tau": _bounded("max-server-learning-rate"),
    "strategy.num-malicious-nodes": _AT_SERVER,
    "strategy.num-nodes-to-select": _AT_SERVER,
    "strategy.trimmed-share": _AT_SERVER,
    "personalisation.name": _listed("personal-adapters"),
    "personalisation.steps": _bounded("max-steps-per-visit"),
    "personalisation.learning-rate": _bounded("max-learning-rate"),
    "personalisation.proximal-mu": _bounded("max-proximal-mu"),
    "personalisation.weights": _harmless("between no training of the site's own and all of it"),
    "communication.uplink-codec": _LESS,
    "communication.downlink-codec": _LESS,
    "communication.downlink": _LESS,
    "communication.catch-up-codec": _LESS,
    "communication.block-size": _LESS,
    "communication.kept-share": _LESS,
    "communication.entropy-coding": _LESS,
    "defence.update-norm-bound": _AT_SERVER,
    "defence.largest-norm": _AT_SERVER,
    "defence.min-cosine": _AT_SERVER,
    "defence.largest-spread": _AT_SERVER,
    "defence.preset": _AT_SERVER,
    "privacy.unit-guarantee": _private("require"),
    "privacy.target-epsilon": _private("epsilon-total", "epsilon-of-run"),
    "privacy.noise-multiplier": _private("epsilon-total", "epsilon-of-run"),
    "privacy.delta": _own("the lower one of the run's and the site's counts"),
    "privacy.clipping-norm": _private("min-clipping-norm", "max-clipping-norm"),
    "privacy.sampling-rate": _private("max-sampling-rate", "max-steps-of-run"),
    "privacy.report-train-loss": _private("report-train-loss"),
    "privacy.declared-units": _OWN_UNITS,
    "privacy.unit-column": _OWN_UNITS,
    "privacy.max-records-of-unit": _OWN_UNITS,
    "data.num-partitions": _own("it must equal node.num-partitions"),
    "data.partitioner": _OWN_DATA,
    "data.partition-by": _OWN_DATA,
    "data.dirichlet-alpha": _OWN_DATA,
    "data.subgroup-columns": _own("of these, only what tell.subgroup-columns of site.toml names"),
    "data.held-out-fraction": _OWN_DATA,
    "data.prompt-template": _listed("prompt-templates"),
    "data.template-date": _harmless("a date in the prompt, of ten characters"),
    "data.template-options": _bounded("max-prompt-characters"),
    "data.system-prompt": _bounded("max-prompt-characters"),
    "data.train-on": _harmless("which answers of a conversation are learned"),
    "data.question-column": _OWN_DATA,
    "data.answer-column": _OWN_DATA,
    "data.rejected-column": _OWN_DATA,
    "static.dataset.name": _OWN_DATA,
    "static.dataset.config": _OWN_DATA,
    "static.dataset.split": _OWN_DATA,
    "static.dataset.revision": _OWN_DATA,
}
"""Key → verdict. The checks themselves are in `policy`."""
