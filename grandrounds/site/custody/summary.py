"""What a recipe asks of a site, in a few lines for the person who approves it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from grandrounds.config import recipes
from grandrounds.config.keys import PATTERNS
from grandrounds.config.prompt import KEY, is_own, name_of, sha256_of
from grandrounds.config.words import NOT_TOLD, shown
from grandrounds.errors import GrandRoundsError
from grandrounds.site.custody import policy
from grandrounds.site.custody.approvals import SHORT, Recipe
from grandrounds.site.custody.site_file import SiteFile


def lines_of(recipe: Recipe, others: Sequence[Recipe]) -> Iterator[str]:
    """Yield the lines that describe a recipe.

    Parameters
    ----------
    others
        All recipes of the site; the differences to the one approved last are listed.
    """
    value = defaultdict(lambda: NOT_TOLD, recipe.values)  # another version may have kept it
    arguments = "train.training-arguments."
    alpha, rank = value["model.lora.peft-lora-alpha"], value["model.lora.peft-lora-r"]
    steps, batch = value[f"{arguments}max-steps"], value[f"{arguments}per-device-train-batch-size"]
    visit = f"{steps} steps" if steps != -1 else f"{value[f'{arguments}num-train-epochs']} epochs"
    accumulated = value[f"{arguments}gradient-accumulation-steps"]
    template = str(value["data.prompt-template"])
    kind = "DoRA, " if value["model.lora.peft-use-dora"] is True else ""
    kind += "rsLoRA" if value["model.lora.use-rslora"] is True else "LoRA"
    whose = f"signed by {recipe.signed_by}" if recipe.signed_by else "not signed"
    since = f", asked for by run {recipe.run} at {recipe.asked}" if recipe.run else ""
    yield f"    {whose}{since}"
    yield (
        f"    base {value['model.name']}, prompt {name_of(template)}, {kind} of rank "
        f"{rank} and alpha {alpha} on {value['model.lora.target-modules']}"
    )
    if sha256 := recipe.values.get("model.lora.from-adapter-sha256"):
        yield f"    goes on from a saved adapter, SHA-256 {sha256}"
    if is_own(template):
        yield f"    prompt template, SHA-256 {sha256_of(template)}:"
        yield from (f"      | {_visible(line)}" for line in template.split("\n"))
    for key in (*PATTERNS, "data.system-prompt", "data.template-options"):
        if recipe.values.get(key):
            yield f"    {key} {shown(str(recipe.values[key]))}"
    yield (
        f"    {value['num-server-rounds']} rounds of {value['strategy.name']} with "
        f"{value['data.num-partitions']} sites, learning rate {value['train.learning-rate-max']} "
        f"to {value['train.learning-rate-min']}, {value['train.optimizer']}"
    )
    yield (
        f"    visits of {visit}, {accumulated} x {batch} examples a step, at most "
        f"{value['train.seq-length']} tokens each"
    )
    if value["privacy.unit-guarantee"] == "example":
        target, noise = value["privacy.target-epsilon"], value["privacy.noise-multiplier"]
        how = f"epsilon {target} of the run" if target else f"a noise multiplier of {noise}"
        tells = ", asks for noised losses" if value.get("privacy.report-train-loss") else ""
        yield f"    private visits: {how}, clipping norm {value['privacy.clipping-norm']}{tells}"
    approved = [o for o in others if o.approved and o.sha256 != recipe.sha256]
    if approved:
        last = max(approved, key=lambda other: other.approved)
        keys = [key for key in recipe.values if value[key] != last.values.get(key)]
        changes = ", ".join(
            f"{key}: {_named(key, last.values.get(key))} → {_named(key, value[key])}"
            for key in keys
        )
        yield f"    from {last.sha256[:SHORT]}, approved {last.approved}: {changes}"


def _visible(line: str) -> str:
    """Return a line with what nobody sees escaped, such as marks that reverse its direction."""
    return "".join(ascii(c)[1:-1] if not c.isprintable() and c != "\t" else c for c in line)


def _named(key: str, value: object) -> str:
    is_template = key == KEY and isinstance(value, str)
    return repr(name_of(str(value)) if is_template else value)


def objection(site: SiteFile, recipe: Recipe) -> str:
    """Return why the site's policy refuses a recipe all the same; empty if it does not.

    What depends on the base or on the number of the site's examples is left out.
    """
    try:
        policy.check_recipe(site, recipes.resolve(recipe.values))
    except GrandRoundsError as error:
        return str(error)
    return ""
