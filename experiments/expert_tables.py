"""Tables of the rows that `specialisation`, `copies`, `persistence` and `dropping` write."""

from pandas import DataFrame, Series

from experiments.comparisons import differences_table, pairs_table, with_error
from experiments.rows import DEFAULTS, frame_of
from runtime.errors import UserError
from tools.benchmarks.common import markdown


def information_tables(
    rows: list[dict], arms: tuple[str, ...] = (), reference: str | None = None
) -> str:
    """Returns Markdown tables of mutual information (bits).

    The second table compares the trained router with the random one and, for other arms than the
    reference, with the trained router of the reference, for arms with several runs.
    """
    bits = frame_of(rows).drop(columns="run").set_index(["arm", "router", "seed"])
    known = dict.fromkeys(bits.index.get_level_values("arm"))
    if unknown := {*arms, reference or next(iter(known))} - {*known}:
        expected = f"some of {', '.join(known)}"
        raise UserError(f"--arms, --reference: got {min(unknown)}, expected {expected}")
    bits = bits.sort_index()
    lines, found = [["arm", "router", "runs", *bits.columns]], {}
    for arm in arms or known:
        routers = {router: bits.loc[arm, router] for router in ("trained", "random")}
        for router, values in routers.items():
            cells = (with_error(values[name], digits=3) for name in bits.columns)
            lines.append([arm, router, str(len(values)), *cells])
        others = {"random router": routers["random"]}
        if reference not in (None, arm):
            others[reference] = bits.loc[reference, "trained"]
        for name in bits.columns:
            for other, values in others.items():
                pairs = routers["trained"][name] - values[name]
                if len(pairs) > 1 and pairs.any():
                    found[arm, name, other] = pairs
    return markdown(lines) + differences_table(["arm", "bits about", "minus"], found, digits=3)


def mean_of(values: Series) -> Series:
    """Returns the means over the layers; nan for a run without sparse layers."""
    return values.map(lambda layers: sum(layers) / len(layers) if layers else float("nan"))


def copies_tables(rows: list[dict], pairs: tuple[str, ...]) -> str:
    """Returns Markdown tables: the likeness of copied experts, by arm and step.

    A second table compares the held-out losses of pairs (ARM:REFERENCE) at the last step, or
    earlier, as in ARM@100.
    """
    frame = frame_of(rows)
    lines = [["arm", "runs", "step", "cosine", "smallest of a layer", "cosine of changes",
              "size of changes", "unchanged in bf16", "held-out loss"]]  # fmt: skip
    for (arm, step), group in frame.groupby(["arm", "step"], sort=False):
        loss, cells = group["val_loss"].astype(float), [""] * 5
        if group["cosine"].iloc[0]:  # a sparse model
            mean = {name: mean_of(group[name]) for name in
                    ("cosine", "change_cosine", "change", "unchanged")}  # fmt: skip
            cells = [
                f"{mean['cosine'].mean():.4f}", f"{group['cosine'].map(min).min():.4f}",
                with_error(mean["change_cosine"], digits=3) if step else "",
                f"{mean['change'].mean():.4f}", f"{mean['unchanged'].mean():.0%}",
            ]  # fmt: skip
        cells.append("" if loss.isna().all() else with_error(loss))
        if any(cells):
            lines.append([arm, str(len(group)), str(step), *cells])
    names = frame["arm"] + frame["step"].map("@{}".format)
    frame["arm"] = names.where(frame["step"] < frame["step"].max(), frame["arm"])
    losses = frame.pivot(index="seed", columns="arm", values="val_loss").astype(float)
    return markdown(lines) + pairs_table(losses, pairs)


def percent(shares: Series) -> str:
    """Formats the mean share over the layers and runs in percent, ± its standard error."""
    return with_error(100 * mean_of(shares), digits=1)


def persistence_tables(rows: list[dict]) -> str:
    """Returns a Markdown table of the shares of kept experts, by arm and router, in percent.

    A second table compares the trained with the random router, for arms with several runs.
    """
    kinds = {"next": "next step", "ends": "first to last step", "other": "other image",
             "chance": "by chance"}  # fmt: skip
    frame, found = frame_of(rows), {}
    lines = [["arm", "router", "runs", *kinds.values()]]
    for (arm, router), group in frame.groupby(["arm", "router"], sort=False):
        lines.append([arm, router, str(len(group)), *(percent(group[kind]) for kind in kinds)])
    for kind, name in kinds.items():
        shares = frame.assign(share=100 * mean_of(frame[kind]))
        shares = shares.set_index(["arm", "seed", "router"])["share"].unstack()
        for arm, pairs in (shares["trained"] - shares["random"]).groupby("arm", sort=False):
            if kind in ("next", "ends") and len(pairs) > 1:
                found[arm, name] = pairs.droplevel("arm")
    return markdown(lines) + differences_table(["arm", "share"], found, digits=1)


def dropping_tables(rows: list[dict]) -> str:
    """Returns a Markdown table of the loss without some experts, by number and kind of choice.

    A number is the mean over runs and, at random, draws; with several runs of an arm, the errors
    are over runs. The last column is, for quantised experts, the share of those with the least
    damage that also have the least damage in full precision. For arms of several runs, a second
    table follows, see `choices_table`.
    """
    frame = frame_of([DEFAULTS | row for row in rows])
    kinds, tested = frame["choice"].unique(), {}
    least = {
        (row["run"], row["quantize"], row["dropped"]): row["of_layers"]
        for row in rows if row["choice"] == "damage"
    }  # fmt: skip
    is_quantized = frame["quantize"].nunique() > 1
    lines = [["run", "experts dropped per layer", *kinds, *["same as in fp32"] * is_quantized]]
    settings = ["arm", "quantize", "silenced", "dropped"]
    for (arm, quantize, silenced, number), group in frame.groupby(settings, sort=False):
        changes = group.groupby(["run", "choice"])["change"].mean().unstack()
        cells = []
        for kind in kinds:
            of_kind = group[group["choice"] == kind]
            several = changes[kind] if len(changes) > 1 else of_kind["change"]
            error = several.sem() if len(several) > 1 else of_kind["error"].iloc[0]
            cells.append(f"{several.mean():+.4f} ± {error:.4f}")
        if is_quantized:
            run = group["run"].iloc[0]
            theirs = least.get((run, "none", number))
            has_both = quantize != "none" and theirs is not None
            cells.append(common(least[run, quantize, number], theirs) if has_both else "")
        name = arm + ("" if quantize == "none" else f" {quantize}") + ", silenced" * silenced
        experts = group["experts"].iloc[0]
        lines.append([name, f"{number} of {experts}", *cells])
        if len(changes) > 1 and 4 * number == experts:
            tested[name] = changes
    return markdown(lines) + (choices_table(tested, list(kinds)) if tested else "")


def choices_table(changes: dict[str, DataFrame], kinds: list[str]) -> str:
    """Returns a Markdown table of differences between choices of a quarter of the experts.

    Only a quarter is tested, to keep the correction small. The pairs are runs or, of several arms,
    the means of the arms.

    changes: changes of the loss of each arm, (runs, kinds of choice)
    """
    name, frame = next(iter(changes.items()))
    if len(changes) > 1:
        name, frame = f"{len(changes)} arms", DataFrame([each.mean() for each in changes.values()])
    found = {
        (name, f"{ours} minus {theirs}"): (frame[ours] - frame[theirs]).reset_index(drop=True)
        for ours in ("damage", "output") if ours in kinds
        for theirs in kinds if theirs not in (ours, "damage")
    }  # fmt: skip
    return differences_table(["run", "choice"], found, digits=4)


def common(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Returns how many of our experts of all layers are theirs too, as in "10 of 12"."""
    found = sum(len({*one} & {*other}) for one, other in zip(ours, theirs, strict=True))
    return f"{found} of {sum(map(len, ours))}"
