"""The command line: one function per verb, each a thin shell around one public function.

Every verb takes `--json`: the result then is JSON on stdout, and messages and progress go to stderr. What a
verb needs is imported when it runs, so that `generate` starts fast. Exit codes: `gristmill.terminal.output`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from gristmill.errors import UsageError
from gristmill.terminal import output
from gristmill.terminal.progress import Bar, PromptBar
from gristmill.version import __version__

if TYPE_CHECKING:
    from gristmill.api import Model

__all__ = ["app", "main"]

WEIGHTS = ("stored", "f32", "bf16", "int8", "int4")
ACTIVATIONS = ("exact", "bf16", "fast")
KV_DTYPES = ("f32", "bf16", "int4", "int4-channel")
EXPORTS = ("compressed-tensors", "bf16", "f16", "f32")

Command = TypeVar("Command", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program `gristmill`: runs a command line (None: this process's) and exits."""
    sys.exit(output.run(lambda: _dispatch(arguments)))


def _dispatch(arguments: Sequence[str] | None) -> int:
    if "_GRISTMILL_COMPLETE" in os.environ:
        app.main(prog_name="gristmill")  # the shell asks for completions
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Not `app.main`, which has its own ideas about interrupts and broken pipes.
        with app.make_context("gristmill", words) as context:
            app.invoke(context)
        return 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "gristmill"
        raise UsageError(f"{error.format_message().rstrip('.')}: try `{path} --help`") from None
    except click.ClickException as error:
        raise UsageError(error.format_message()) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")

threads_option = click.option(
    "-t",
    "--threads",
    type=int,
    envvar="GRISTMILL_THREADS",
    help="Threads to compute with. [default: all that this process may use]",
)

mode_options = _options(
    click.option(
        "-w",
        "--weights",
        type=click.Choice(WEIGHTS),
        default="stored",
        show_default=True,
        envvar="GRISTMILL_WEIGHTS",
        help="Weights as the file stores them, or converted (once, into the cache).",
    ),
    click.option(
        "-a",
        "--activations",
        type=click.Choice(ACTIVATIONS),
        envvar="GRISTMILL_ACTIVATIONS",
        help="Arithmetic of the linear layers. [default: fast for integer weights, else the weights' own]",
    ),
    click.option(
        "--kv-dtype",
        type=click.Choice(KV_DTYPES),
        envvar="GRISTMILL_KV_DTYPE",
        help="Keys and values in the KV cache. [default: as the model says, else bf16]",
    ),
    click.option(
        "--lora",
        multiple=True,
        metavar="DIR",
        help="Add a LoRA adapter in PEFT's format. May be repeated.",
    ),
    click.option(
        "--lora-strength",
        multiple=True,
        type=float,
        metavar="X",
        help="Strength of each adapter, in their order. [default: 1]",
    ),
    threads_option,
)

model_options = _options(
    mode_options,
    click.option(
        "-c",
        "--context",
        type=int,
        envvar="GRISTMILL_CONTEXT",
        help="Most tokens of prompt and answer. [default: the model's, or what fits the memory]",
    ),
)

SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "logprobs",
)

sampling_options = _options(
    click.option("-n", "--max-tokens", type=int, help="Most new tokens. [default: up to the context]"),
    click.option("--temperature", type=float, help="0 to 100; 0 always takes the most probable token."),
    click.option("--top-k", type=int, help="Draw from the k most probable tokens only; 0: from all."),
    click.option("--top-p", type=float, help="Draw from the most probable tokens that make up this share."),
    click.option("--min-p", type=float, help="Drop tokens less probable than this times the best."),
    click.option("--repetition-penalty", type=float, help="Above 1: against tokens seen already."),
    click.option("--presence-penalty", type=float, help="-2 to 2: against tokens of the answer, once."),
    click.option("--frequency-penalty", type=float, help="-2 to 2: against tokens, each time they came."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End at this text. May be repeated."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampling parameters that were given out of a command's options."""
    given = {name: options.pop(name) for name in SAMPLING if name in options}
    if "stop" in given:
        given["stop"] = tuple(output.checked_text(text, "the text of --stop") for text in given["stop"])
    return {name: value for name, value in given.items() if value is not None and value != ()}


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="gristmill %(version)s")
@click.pass_context
def app(context: click.Context) -> None:
    """An LLM inference engine: runs models fast on this machine, and measures what that costs.

    MODEL is a GGUF file, a directory (Hugging Face or checkpoint), a hub name such as owner/repository, or
    smollm2, the demo model. Options that every verb shares can also be set by the environment:
    GRISTMILL_WEIGHTS, GRISTMILL_ACTIVATIONS, GRISTMILL_KV_DTYPE, GRISTMILL_THREADS, GRISTMILL_CONTEXT.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(output.USAGE)


@app.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@sampling_options
@click.option("--logprobs", type=int, help="Log probabilities of each token and of N others; with --json.")
@model_options
@as_json
def generate(*, model: str, prompt: str, raw: bool, as_json: bool, **options: Any) -> None:
    """Answer PROMPT, or continue it with --raw. PROMPT - reads standard input."""
    sampling = _sampling(options)
    if "logprobs" in sampling and not as_json:
        raise UsageError("--logprobs needs --json")
    if prompt == "-":
        prompt = output.read_stdin("the prompt on standard input")
        if not raw:
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    else:
        output.checked_text(prompt, "the prompt")
    _check_sampling(sampling)
    with Bar() as bar, _load(model, bar, **options) as loaded:
        bar.close()
        stream = None if as_json else output.Stream()
        with PromptBar() as prompt_bar:
            try:
                result = loaded.generate(prompt, raw=raw, on_text=stream, on_prompt=prompt_bar, **sampling)
            finally:
                if stream is not None:
                    stream.end()
        if as_json:
            output.show_json(output.result_json(loaded, result))


@app.command()
@click.argument("model")
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--no-history", is_flag=True, help="Do not keep the lines typed for the next chat.")
@sampling_options
@model_options
@as_json
def chat(*, model: str, system: str | None, no_history: bool, as_json: bool, **options: Any) -> None:
    """Talk with MODEL; /help lists the commands.

    The keys and values of earlier turns are kept, so that a turn costs only its own tokens. When the
    conversation outgrows the context, its oldest turns are forgotten, never the system message, until the
    prompt takes up half the context at most. Each line of piped input is a turn; with --json each answer is
    one line of JSON.
    """
    sampling = _sampling(options)
    if system is not None:
        output.checked_text(system, "the system message")
    _check_sampling(sampling)
    with Bar() as bar, _load(model, bar, **options) as loaded:
        bar.close()
        from gristmill.terminal.chat import Chat

        screen = Chat(loaded, system=system, sampling=sampling, as_json=as_json, history=not no_history)
        try:
            screen.run()
        finally:
            screen.close()


def _check_sampling(sampling: dict[str, Any]) -> None:
    """Refuses wrong values before a model is loaded, or even converted."""
    from gristmill.engine.sampling import SamplingParams

    SamplingParams().updated(sampling)


def _load(model: str, bar: Bar, **options: Any) -> Model:
    from gristmill.api import load

    return load(model, progress=bar, **options)


def _counts(text: str) -> tuple[int, ...]:
    """A list of whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 128,512") from None


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    """A list of batch x context pairs."""
    try:
        pairs = [part.split("x") for part in text.split(",") if part.strip()]
        return tuple((int(batch), int(context)) for batch, context in pairs)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of batch x context such as 1x512,16x64") from None


@app.command()
@click.argument("model")
@click.option("--startup", is_flag=True, help="Time every phase from process start to first token instead.")
@click.option(
    "--prefill", type=_counts, metavar="N,N,...", default="512", show_default=True, help="Prompt lengths."
)
@click.option(
    "--decode",
    type=_shapes,
    metavar="BxC,BxC,...",
    default="1x512,16x64,16x512",
    show_default=True,
    help="Sequences x tokens that each holds at the start.",
)
@click.option("--decode-steps", type=int, default=64, show_default=True, help="Tokens generated per run.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Runs; figures are their medians.")
@mode_options
@as_json
def bench(
    *,
    model: str,
    startup: bool,
    prefill: tuple[int, ...],
    decode: tuple[tuple[int, int], ...],
    decode_steps: int,
    repeats: int,
    as_json: bool,
    **modes: Any,
) -> None:
    """Measure MODEL's speed on this machine.

    Prefill and decode with the roofline beside them, loading and memory; or, with --startup, every phase from
    process start to first token.
    """
    from gristmill import bench as measurements

    with Bar() as bar:
        if startup:
            result = measurements.startup(model, repeats=repeats, progress=bar, **modes)
        else:
            result = measurements.run(
                model,
                prefill=prefill,
                decode=decode,
                decode_steps=decode_steps,
                repeats=repeats,
                progress=bar,
                **modes,
            )
    if as_json:
        output.show_json(result)
    else:
        output.show(measurements.render_startup(result) if startup else measurements.render(result))


class _ServeCommand(click.Command):
    """A verb with an option for every setting of a server; they are read when the verb is used."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if len(self.params) == 2:
            self.params += _server_options()
        return super().get_params(ctx)


def _server_options() -> list[click.Parameter]:
    try:
        from gristmill.serve.settings import Settings, option_names
    except ImportError as error:
        raise UsageError(f"serving needs more packages: pip install 'gristmill[serve]' ({error})") from None
    options: list[click.Parameter] = []
    for name, (text, kind) in option_names().items():
        default = Settings.model_fields[name].default
        silent = default is None or default == () or isinstance(default, bool)
        shown = text if silent else f"{text} [default: {default}]"
        flag = "--" + name.replace("_", "-")
        short = {"weights": ["-w"], "threads": ["-t"], "context": ["-c"]}.get(name, [])
        if kind == "flag":
            options.append(click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=shown))
        elif kind == "many":
            options.append(click.Option([flag, name], multiple=True, metavar="TEXT", help=shown))
        elif isinstance(kind, tuple):
            options.append(click.Option([*short, flag, name], type=click.Choice(kind), help=shown))
        else:
            options.append(click.Option([*short, flag, name], metavar="X", help=shown))
    return options


@app.command(cls=_ServeCommand)
@click.argument("model", required=False)
@click.option("--config", type=click.Path(), help="A YAML file with settings by the names of the options.")
def serve(*, model: str | None, config: str | None, **flags: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI's API.

    Every option is also a variable GRISTMILL_<OPTION> and a key of the file; options go before variables,
    variables before the file. SIGTERM lets running requests finish.
    """
    from gristmill.serve.settings import load_settings

    settings, rest = load_settings(flags, config)
    try:
        from gristmill.serve.logs import event
        from gristmill.serve.server import check_model, run
    except ImportError as error:
        raise UsageError(f"serving needs more packages: pip install 'gristmill[serve]' ({error})") from None

    def announce(address: str) -> None:
        if settings.log_format == "json":
            event(f"listening on {address}")
        else:
            click.echo(f"listening on {address} (loading the model; /ready tells when)", err=True)

    raise click.exceptions.Exit(run(check_model(model or rest.get("model")), settings, announce))


@app.command()
@click.argument("model")
@click.option("--base", metavar="MODEL", help="The model to compare with. [default: MODEL itself]")
@click.option("--text", type=click.Path(), help="A UTF-8 file. [default: Python's own documentation]")
@click.option("--tokens", type=int, default=4096, show_default=True, help="How much of the text is read.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens read in one piece.")
@mode_options
@click.option(
    "--phase",
    type=click.Choice(("generated", "prompt")),
    default="generated",
    show_default=True,
    help="What the model takes the text for; on AMX the arithmetic of the two differs.",
)
@click.option(
    "--base-weights",
    type=click.Choice(WEIGHTS),
    default="f32",
    show_default=True,
    help="Weights of the base.",
)
@click.option(
    "--base-activations",
    type=click.Choice(ACTIVATIONS),
    default="exact",
    show_default=True,
    help="Arithmetic of the base.",
)
@click.option(
    "--base-kv-dtype",
    "base_kv",
    type=click.Choice(KV_DTYPES),
    default="f32",
    show_default=True,
    help="KV cache of the base.",
)
@as_json
def evaluate(*, model: str, as_json: bool, **options: Any) -> None:
    """Measure what a mode costs in quality.

    KL divergence, top-1 agreement and perplexity against a base, over the same text.
    """
    from gristmill import evaluate as quality

    with Bar() as bar:
        result = quality.run(model, progress=bar, **options)
    if as_json:
        output.show_json(result)
    else:
        output.show(quality.render(result))


@app.command()
@click.argument("model")
@click.option(
    "-w",
    "--weights",
    type=click.Choice(WEIGHTS),
    help="Show the model converted to these weights. [default: as the files are; with --program: stored]",
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--program", is_flag=True, help="Show the program: every node with its bytes and operations.")
@click.option("--layers", is_flag=True, help="With --program: show equal layers one by one.")
@click.option(
    "--decode",
    type=_shapes,
    metavar="BxC",
    help="With --program: a step of this many sequences x tokens held. [default: 1x512]",
)
@click.option("--prefill", type=int, help="With --program: a step of a prompt of this many tokens.")
@click.option(
    "--verify", is_flag=True, help="Compare all tensors and files of a checkpoint with their hashes first."
)
@click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    help="With --program: keys and values in the KV cache. [default: as the model says, else bf16]",
)
@as_json
def inspect(
    *,
    model: str,
    weights: str | None,
    tensors: bool,
    program: bool,
    layers: bool,
    decode: tuple[tuple[int, int], ...] | None,
    prefill: int | None,
    kv_dtype: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Show what MODEL is, or its program.

    Architecture, sizes, tensor formats and tokenizer are read from the files' headers. --program converts
    the model and shows every node with its bytes and operations.
    """
    from gristmill import inspect as inspection
    from gristmill.terminal import tables

    if not program and (layers or decode is not None or prefill is not None):
        raise UsageError("--layers, --decode and --prefill go with --program")
    if program and verify:
        raise UsageError("--verify goes without --program")
    if decode is not None and (len(decode) != 1 or prefill is not None):
        raise UsageError("--program shows one step: give one --decode shape or one --prefill length")
    with Bar() as bar:
        if program:
            found = inspection.program(
                model,
                weights=weights or "stored",
                kv_dtype=kv_dtype,
                prefill=prefill,
                decode=decode[0] if decode else (1, 512),
                collapse=not layers,
                progress=bar,
            )
        else:
            found = inspection.run(model, weights=weights, verify=verify, progress=bar)
    if as_json:
        output.show_json(found)
    else:
        output.show(tables.program_table(found) if program else tables.model_table(found, tensors))


@app.command()
@click.argument("model", required=False)
@click.option(
    "-w",
    "--weights",
    type=click.Choice(WEIGHTS),
    multiple=True,
    default=("stored",),
    help="Convert to these weights. May be repeated. [default: stored]",
)
@click.option("--list", "listing", is_flag=True, help="List the converted models in the cache.")
@click.option("--prune", is_flag=True, help="Remove converted models whose source is gone or has changed.")
@click.option("--all", "everything", is_flag=True, help="With --prune: remove all.")
@as_json
def pull(
    *,
    model: str | None,
    weights: tuple[str, ...],
    listing: bool,
    prune: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Get MODEL into the cache, or tidy the cache.

    Downloads the model, unless it is on this machine, and converts it, without running it. With
    --prune, MODEL names one entry of --list to remove.
    """
    from gristmill.io import hub
    from gristmill.terminal import tables

    if everything and not prune:
        raise UsageError("--all goes with --prune")
    if listing and (prune or model is not None):
        raise UsageError("--list goes alone")
    if listing:
        entries = hub.list_cached()
    elif prune:
        if model is not None and (everything or model not in {entry.name for entry in hub.list_cached()}):
            raise UsageError(f"{model} is not a name in the cache: see `gristmill pull --list`")
        entries = hub.prune(everything, [model] if model is not None else [])
    else:
        if model is None:
            raise UsageError("name a model to pull, or use --list or --prune")
        from gristmill.io.convert import prepare

        if sys.stderr.isatty():
            output.say(output.dim(f"[getting {model}]"))
        source = hub.pull(model)
        with Bar() as bar:
            paths = {mode: prepare(source.path, mode, bar) for mode in dict.fromkeys(weights)}
        pulled = tables.pulled(model, source, paths)
        output.show_json(pulled) if as_json else output.show(tables.pulled_table(pulled))
        return
    if as_json:
        output.show_json([tables.cached(entry) for entry in entries])
    else:
        output.show(tables.cached_table(entries, removed=prune))


@app.command()
@click.argument("model")
@click.option("-r", "--recipe", required=True, help="A YAML file, or the name of a method.")
@click.option(
    "-o", "--output", "out", required=True, type=click.Path(), metavar="DIR", help="The checkpoint to write."
)
@click.option("--no-evaluate", is_flag=True, help="Do not measure the result against the base.")
@as_json
def compress(*, model: str, recipe: str, out: str, no_evaluate: bool, as_json: bool) -> None:
    """Apply a recipe to MODEL and write a checkpoint directory, which is a model like any other.

    An interrupted run resumes when it is called again. See `gristmill methods` for what a recipe may name.
    """
    from gristmill.methods.compress import compress as run
    from gristmill.terminal import recipes

    with Bar() as bar:
        began = time.perf_counter()
        report = run(model, recipe, out, evaluate=not no_evaluate, progress=bar)
    shown = {key: value for key, value in report.items() if key != "sha256"} | {
        "out": str(out),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    output.show_json(shown) if as_json else output.show(recipes.compressed_table(shown))


@app.command()
@click.argument("name", required=False)
@as_json
def methods(*, name: str | None, as_json: bool) -> None:
    """List the methods that recipes may name, with what was measured of each; or show NAME's options."""
    from gristmill.methods import catalogue
    from gristmill.terminal import recipes

    found: Any = catalogue.describe(name) if name else catalogue.listing()
    if as_json:
        output.show_json(found)
    else:
        output.show(recipes.method_table(found) if name else recipes.methods_table(found))


@app.command()
@click.argument("model")
@click.option(
    "-r", "--recipes", required=True, multiple=True, help="A YAML file or a method. May be repeated."
)
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    type=click.Path(),
    metavar="DIR",
    help="Where the checkpoints and the plot go.",
)
@click.option("--text", type=click.Path(), help="UTF-8 text to evaluate on. [default: pydoc_data.topics]")
@click.option("--tokens", type=int, default=4096, show_default=True, help="Tokens to evaluate on.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Turns of the speed measurement.")
@click.option("--no-plot", is_flag=True, help="Do not draw DIR/pareto.png.")
@threads_option
@as_json
def compare(*, model: str, out: str, no_plot: bool, as_json: bool, **options: Any) -> None:
    """Compress MODEL by several recipes and compare size, quality and speed in one run."""
    from pathlib import Path

    from gristmill.methods import compare as comparing
    from gristmill.terminal import recipes as tables

    if not no_plot:
        comparing.need_plot()
    with Bar() as bar:
        result = comparing.compare(model, out=out, progress=bar, **options)
    (Path(out) / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    output.show_json(result) if as_json else output.show(tables.comparison_table(result))
    if not no_plot:
        comparing.plot(result, Path(out) / "pareto.png")


@app.command()
@click.argument("model")
@click.option(
    "-o", "--output", "target", required=True, type=click.Path(), metavar="DIR", help="The directory to make."
)
@click.option(
    "--as",
    "form",
    type=click.Choice(EXPORTS),
    required=True,
    help="The integers, code for code, or the decoded weights.",
)
@click.option(
    "-w",
    "--weights",
    type=click.Choice(WEIGHTS),
    default="stored",
    show_default=True,
    help="Weights as the file stores them, or converted (once, into the cache).",
)
@as_json
def export(*, model: str, target: str, form: str, weights: str, as_json: bool) -> None:
    """Write MODEL as a Hugging Face directory that other programs load.

    compressed-tensors keeps integer weights in their codes, where it can express them. The directory must
    not exist.
    """
    from pathlib import Path

    from gristmill.io import export as exporting
    from gristmill.io.convert import prepare
    from gristmill.terminal import tables

    out = Path(target)
    exporting.check_new(out)
    with Bar() as bar:
        exporting.export(prepare(model, weights, bar), out, form, bar)
    result = tables.exported(model, form, out)
    output.show_json(result) if as_json else output.show(tables.exported_table(result))
