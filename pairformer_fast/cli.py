"""Command line. Everything heavy is imported inside the commands, so that help and input errors come at once."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pairformer_fast.config import BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.settings import Attention, FoldSettings, Model, Precision
from pairformer_fast.user_errors import FAILED, complain, run_app

if TYPE_CHECKING:
    from pairformer_fast.inference.compare import Comparison
    from pairformer_fast.inference.inspection_run import JobInspection
    from pairformer_fast.inference.regress import Regression
    from pairformer_fast.inference.report import JobReport, RunReport

NAME = "pairformer-fast"

app = typer.Typer(
    name=NAME,
    help="Fold proteins with an accelerated Pairformer and compare with its unaccelerated reference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights (safetensors). Bundled antibody weights if omitted.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")]
FastaArgument = Annotated[Path, typer.Argument(metavar="IN.fasta", help="One record a job; ':' joins chains.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results.")]
BiasOption = Annotated[BiasMethod, typer.Option("--bias", help="What becomes of the pair bias.")]
RankOption = Annotated[int | None, typer.Option("--rank", help="Fixed rank of the factors.")]
ToleranceOption = Annotated[
    float | None, typer.Option("--tolerance", help="Largest change of attention weights, 0 to 1.")
]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="auto: fp32 on a CPU, bf16 on CUDA.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed.")]
RecyclesOption = Annotated[
    int | None, typer.Option("--recycles", help="Recycles; the checkpoint's default if omitted.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pairformer-fast {version('pairformer_fast')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def fold(
    fasta: FastaArgument,
    out: OutArgument,
    attention: Annotated[Attention, typer.Option(help="Path that predicts; auto is flashbias.")] = Attention.AUTO,
    bias: BiasOption = BiasMethod.AUTO,
    rank: RankOption = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.AUTO,
    seed: SeedOption = 0,
    recycles: RecyclesOption = None,
    compare: Annotated[
        bool | None,
        typer.Option(
            "--compare/--no-compare", help="Predict with the reference, too, and compare.  [default: compare]"
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    factors: Annotated[
        Path | None, typer.Option(help="Networks for --bias learned; CHECKPOINT.factors.safetensors if omitted.")
    ] = None,
    model: Annotated[Model, typer.Option(help="openfold3 takes its own --checkpoint.")] = Model.PAIRFORMER,
    msa_dir: Annotated[
        Path | None, typer.Option(help="Folder with ID.a3m or ID_CHAIN.a3m for every chain (openfold3).")
    ] = None,
    runner_yaml: Annotated[Path | None, typer.Option(help="Further settings in OpenFold3's format.")] = None,
    relax: Annotated[bool, typer.Option("--relax", help="Relax structures with OpenMM, extra [relax].")] = False,
) -> None:
    """Fold every record of a FASTA file; write structures, comparison and run.json to OUT."""
    settings = FoldSettings(
        model=model,
        attention=attention,
        bias=bias,
        rank=rank,
        tolerance=tolerance,
        device=device,
        precision=precision,
        seed=seed,
        recycles=recycles,
        compare=compare,
        checkpoint=checkpoint,
        factors=factors,
        msa_dir=msa_dir,
        runner_yaml=runner_yaml,
        relax=relax,
    )
    report = (_fold_with_openfold3 if model is Model.OPENFOLD3 else _fold)(fasta, out, settings)
    Console().print(_fold_table(report))
    for job in report.failed:
        complain(NAME, f"job {job.id} failed: {job.error}")
    if report.failed:
        raise typer.Exit(FAILED)


def _fold(fasta: Path, out: Path, settings: FoldSettings) -> RunReport:
    from pairformer_fast.inference.fasta import read_fasta

    read_fasta(fasta)  # answers bad input before the model's libraries are imported
    from rich.progress import Progress

    from pairformer_fast.inference import pipeline

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        return pipeline.fold(fasta, out, settings, progress)


def _fold_with_openfold3(fasta: Path, out: Path, settings: FoldSettings) -> RunReport:
    from pairformer_fast.inference.openfold3_input import read_input

    read_input(fasta, settings)  # answers bad input before torch and OpenFold3 are imported
    from pairformer_fast.integrations import openfold3_fold

    return openfold3_fold.fold(fasta, out, settings)


@app.command("inspect")
def inspect_pair_biases(
    fasta: FastaArgument,
    out: OutArgument,
    bias: BiasOption = BiasMethod.AUTO,
    method: Annotated[
        list[BiasMethod] | None,
        typer.Option(help="Measured at a ladder of ranks, may be repeated: svd, randomised, structured, landmark."),
    ] = None,
    rank: RankOption = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.AUTO,
    seed: SeedOption = 0,
    recycles: RecyclesOption = None,
    checkpoint: CheckpointOption = None,
) -> None:
    """Show what a model's pair biases are like for each record of a FASTA file, and what factors of them cost."""
    settings = FoldSettings(
        bias=bias,
        rank=rank,
        tolerance=tolerance,
        device=device,
        precision=precision,
        seed=seed,
        recycles=recycles,
        compare=False,
        checkpoint=checkpoint,
    )
    from pairformer_fast.inference.fasta import read_fasta

    read_fasta(fasta)  # answers bad input before the model's libraries are imported
    from rich.progress import Progress

    from pairformer_fast.inference.inspection_run import inspect_biases

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        report = inspect_biases(fasta, out, settings, method or (), progress)
    for job in report.jobs:
        Console().print(_inspection_table(job))
    if report.jobs and not report.plotted:
        complain(
            NAME, "matplotlib is missing, only inspect.json was written; for plots: pip install 'pairformer_fast[plot]'"
        )
    for job_id, reason in report.failed.items():
        complain(NAME, f"job {job_id} failed: {reason}")
    if report.failed:
        raise typer.Exit(FAILED)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Structure to judge (PDB or mmCIF, also .gz).")],
    b: Annotated[Path, typer.Argument(help="Structure to judge it against.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
) -> None:
    """Compare two structures; chains are matched by sequence."""
    from pairformer_fast.inference.compare import compare_structures

    comparison = compare_structures(a, b)
    if as_json:
        typer.echo(comparison.model_dump_json(indent=1))
    else:
        Console().print(_comparison_table(comparison))


@app.command()
def regress(
    golden: Annotated[
        Path | None, typer.Option(help="Folder with golden.fasta and <id>.cif; bundled.", exists=True, file_okay=False)
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the golden structures anew.")] = False,
    shared_data: Annotated[
        Path | None, typer.Option(help="Folder with fv_crystal/: also check crystals.", exists=True, file_okay=False)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")] = None,
    device: DeviceOption = "auto",
    checkpoint: CheckpointOption = None,
) -> None:
    """Check that the model still predicts its golden structures and that factors (svd) change nothing."""
    from pairformer_fast.inference import regress as regression
    from pairformer_fast.inference.files import write_atomically

    settings = FoldSettings(bias=BiasMethod.SVD, device=device, precision=Precision.FP32, checkpoint=checkpoint)
    golden = regression.bundled_golden() if golden is None else golden
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise InputError(f"--json {json_file}: is a folder, or its folder does not exist")
    if update:
        for path in regression.update_golden(golden, settings):
            typer.echo(f"wrote {path}")
    result = regression.regress(golden, settings, crystals=shared_data)
    Console().print(_regression_table(result))
    if json_file is not None:
        write_atomically(json_file, result.model_dump_json(indent=2) + "\n")
    if not result.passed:
        raise typer.Exit(FAILED)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
    epilog="The runner YAML then takes model_update.custom.settings.memory.{train,eval}.use_flashbias.",
)
def openfold3(context: typer.Context) -> None:
    """Run OpenFold3's run_openfold (train, predict, ...) with attention of this package where its YAML says so."""
    try:
        from pairformer_fast.integrations.openfold3_run import run
    except ModuleNotFoundError as error:
        raise InputError(f"{error}; OpenFold3 comes with pip install 'pairformer_fast[openfold]'") from error

    failed = run(context.args)
    for query, reason in failed.items():
        complain(NAME, f"query {query} failed: {str(reason) or type(reason).__name__}")
    if failed:
        raise typer.Exit(FAILED)


def main() -> None:
    """Run the command line; what the user can fix is one line on stderr and exit status 2."""
    run_app(app, NAME, (InputError, OSError))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _fold_table(report: RunReport) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title="accelerated structure against the reference's",
        caption=(
            "N residues; RMSD of CA in Å; lDDT of CA; pLDDT of the accelerated structure; "
            "calls of attention with factors; seconds of both paths"
        ),
    )
    table.add_column("job", overflow="fold", min_width=11)
    for name in ("N", "RMSD", "lDDT", "TM", "pLDDT", "factors", "fast", "ref.", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in report.jobs:
        table.add_row(*_fold_row(job))
    return table


def _fold_row(job: JobReport) -> list[str]:
    if job.status != "ok":
        return [job.id, str(job.residues), job.status]
    seconds = {name: path.seconds for name, path in job.paths.items()}
    first = next(iter(job.paths.values()))
    return [
        job.id,
        str(job.residues),
        _number(job.ca_rmsd, 3),
        _number(job.lddt_ca, 4),
        _number(job.tm_score, 3),
        _number(first.mean_plddt, 1),
        f"{first.factors}/{first.factors + first.dense}",
        _number(seconds.get("flashbias"), 2),
        _number(seconds.get("reference"), 2),
        _number(job.speed_up, 2),
    ]


def _predicted_cost(job: JobInspection) -> str:
    costs = [attention.predicted_cost for attention in job.attentions]
    known = [(c.factors, c.mixed, c.making) for c in costs if c and c.factors is not None and c.mixed is not None]
    if not known:
        return "time of attention with such ranks was not measured"
    factors, mixed, making = (sum(column) / len(known) for column in zip(*known, strict=True))
    device = next(cost.device for cost in costs if cost)
    return (
        f"time of attention on {device} by benchmark, relative to the dense bias: with the factors {factors:.2f}, with "
        f"those tiles dense beside them {mixed:.2f}; making factors of one rank takes {making:.2f} (mean of "
        f"{len(known)} of {len(costs)})"
    )


def _dense_because(job: JobInspection) -> str:
    reasons = dict.fromkeys(attention.reason for attention in job.attentions if attention.reason is not None)
    return "".join(f"\ndense: {reason}" for reason in reasons)


def _inspection_table(job: JobInspection) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{job.id}: pair biases of {job.residues} residues",
        caption=(
            "over heads: rank of the factors (in brackets if the bias stayed dense, also in some), least energy of "
            "as many singular values, largest eps, bound, probed mean and probed maximum, share of tiles with a bound "
            f"above {job.tolerance:g}\n{_predicted_cost(job)}{_dense_because(job)}"
        ),
    )
    table.add_column("attention", overflow="fold", min_width=12)
    for name in ("rank", "energy", "eps", "bound", "mean", "max", "tiles"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, attention in zip(job.labels, job.attentions, strict=True):
        factors = attention.factors
        low, high = min(factors.rank), max(factors.rank)
        ranks = str(low) if low == high else f"{low}-{high}"
        energy = min(s.energy[r - 1] if r else 0.0 for s, r in zip(attention.spectrum, factors.rank, strict=True))
        table.add_row(
            label,
            f"({ranks})" if attention.dense_heads else ranks,
            f"{energy:.0%}",
            *(_number(max(values), 3) for values in (factors.eps, factors.bound)),
            *(_number(max(values), 3) for values in (factors.probed_mean, factors.probed_max)),
            f"{attention.dense_share:.0%}",
        )
    return table


def _comparison_table(c: Comparison) -> Table:
    table = Table("metric", title=escape(f"{c.a} against {c.b}"))
    table.add_column("value", justify="right")
    table.add_row("chains", escape(", ".join(f"{m.a}-{m.b} ({m.identity:.0%} identical)" for m in c.chains)))
    table.add_row("chains without partner", escape(", ".join(c.unmatched_a + c.unmatched_b)) or "none")
    table.add_row("residues compared", f"{c.residues} of {c.residues_a} and {c.residues_b}")
    table.add_row("atoms compared", str(c.atoms))
    for label, value, digits in [
        ("CA RMSD (Å)", c.ca_rmsd, 3),
        ("all-atom RMSD (Å)", c.all_atom_rmsd, 3),
        ("lDDT-CA", c.lddt_ca, 4),
        ("lDDT", c.lddt, 4),
        ("TM-score", c.tm_score, 4),
        ("GDT-TS", c.gdt_ts, 4),
        ("GDT-HA", c.gdt_ha, 4),
        ("mean pLDDT difference", c.plddt_difference, 2),
    ]:
        table.add_row(label, _number(value, digits) or "not available")
    return table


def _regression_table(result: Regression) -> Table:
    table = Table("gate", "of", title="structure regression")
    for name in ("measured", "limit", "verdict"):
        table.add_column(name, justify="right")
    for gate in result.gates:
        limit = f"{'at most' if gate.upper else 'at least'} {gate.limit:g}"
        table.add_row(gate.name, gate.subject, f"{gate.measured:.4f}", limit, "pass" if gate.passed else "FAIL")
    for skipped in result.skipped:
        table.add_row(skipped, "", "", "", "skipped")
    return table
