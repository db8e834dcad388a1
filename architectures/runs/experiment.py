"""Registration of networks: the `Experiment` that each network's package exports for the rest of the package.

The description itself is light: the command's parser reads it, and loads neither torch nor numpy for that. What is
heavy stands in it as a reference, ``"<file>:<name>"`` below the network's package, and is imported when
`Experiment.load` is asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .options import OptionGroup, RecipeOption

NNUNET_DEFAULTS = {  # the `shown_defaults` of networks that train as nnunet_recipe.py says
    "image_size": "256",
    "augment": "nnunet",
    "epochs": "1000",
    "batch_size": "12",
    "lr": "0.01",
    "seed": "42",
}


@dataclass(frozen=True)
class Demo:
    """A network's ``trifuse demo``.

    Attributes:
        summary: one line for ``--help``.
        run: reference of ``run(out, *, seed, overwrite, command, **further)``, which returns the path of the report,
            ``out/run/report.md``.
        options: further ones, handed over by the name of their ``path``.
        folders: of the runs that it writes, below its own.
        packages: optional ones that it needs, with the extra that installs each.
    """

    summary: str
    run: str
    options: tuple[RecipeOption, ...] = ()
    folders: tuple[str, ...] = ("run",)
    packages: Mapping[str, str] = field(default_factory=lambda: {"scipy": "med", "matplotlib": "med"})


@dataclass(frozen=True)
class Ablation:
    """A network's ``trifuse ablate``.

    Attributes:
        summary: one line for ``--help``.
        run: reference of ``run(out, *, seeds, epochs, cases, command, **further)``, which returns the path of a table;
            it is given only those of these that are on the command line, and has defaults for the others.
        epochs, cases, seeds: what ``--help`` says of those defaults: epochs of each training, cases of the phantom,
            repetitions of each row.
        options: further ones, handed over by the name of their ``path``.
        packages: optional ones that it needs beside those of every report.
    """

    summary: str
    run: str
    epochs: str
    cases: str
    seeds: str = "3"
    options: tuple[RecipeOption, ...] = ()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converter:
    """A format of published weights that ``trifuse convert`` reads.

    Attributes:
        name: what stands after ``trifuse convert``.
        summary: one line for ``--help``.
        run: reference of ``run(file, out)``, which returns what it wrote, to be printed.
    """

    name: str
    summary: str
    run: str


@dataclass(frozen=True)
class Pretraining:
    """A training of a part of a network, with a name of its own after ``trifuse train``.

    Attributes:
        name: what stands after ``trifuse train``.
        summary: one line for ``--help``.
        recipe: reference of its recipe.
        run: reference of ``run(recipe, out, **options)``, the options being `RunOptions`; returns the path of a report.
        sources: options of which one, and only one, is to be given.
        options: the further ones.
        groups: those that stand under a title of their own.
        defaults: see `Experiment.defaults`.
    """

    name: str
    summary: str
    recipe: str
    run: str
    sources: tuple[RecipeOption, ...]
    options: tuple[RecipeOption, ...] = ()
    groups: tuple[OptionGroup, ...] = ()
    defaults: str = ""


@dataclass(frozen=True)
class Quick:
    """A run of seconds that has all that resuming must restore, for ``trifuse torture``.

    Attributes:
        words: of ``trifuse train``, after the cohort; ``--epochs`` is among them.
        cohort: reference of ``write(folder)``, which writes a cohort and its split and returns their paths; one network
            has it, for all of them.
    """

    words: tuple[str, ...]
    cohort: str = ""


@dataclass(frozen=True)
class Experiment:
    """A network, and how it is trained, judged and shown. References are ``"<file>:<name>"`` below ``package``.

    Attributes:
        name: of the network, in commands and on disk.
        package: the network's own, ``__package__``.
        summary: one line for ``--help``.
        network: reference of the class, a `Pretrained`.
        recipe: reference of the recipe, a frozen dataclass with ``data``, ``network`` and ``training``, and a default
            for each of its fields; ``network`` has the fields ``num_classes`` and ``init_seed``.
        fit: reference of ``fit(model, recipe, data, out)``, which returns the arguments of
            `trifuse.architectures.training.loop.fit` that are this network's own: ``loss`` at least.
        title: reference of ``title(recipe)``, the first line of a report.
        report: reference of ``report(best, recipe, data, out)``, which returns the arguments of `report_run` that are
            this network's own; ``out`` is the folder of the run. Empty where there are none.
        paper: reference of how to cite the publication.
        protocol: reference of how the publication scored, a `trifuse.architectures.evaluation.protocols.Protocol`:
            every report has its scores beside the strict ones. Empty where there is none.
        paper_tables: reference of ``paper_tables(targets)``, what it reports for a cohort of as many targets.
        decisions: reference of what a run has to settle, a sequence of `trifuse.architectures.runs.decisions.Decision`:
            the table of them stands in every report.
        variants: names of its published sizes, values of ``network.variant``.
        shown_defaults: what ``--help`` says that happens where an option is not given, by the option's name; a test
            holds it against the recipe.
        options: its own ones of ``trifuse train``.
        defaults: reference of ``defaults(given, config)``: defaults, by dotted name, that depend on the values
            ``given`` on the command line and on the path of the configuration file, or None.
        check: reference of ``check(recipe)``, which refuses a recipe before anything is written.
        sigmoid: whether one logit may stand for two classes.
        training_inputs: reference of ``training_inputs(recipe, cohort, split, out, *, force_resume)``, what cases bring
            beside their images; called on every rank, once the folder is claimed, it may itself train networks below
            ``out``, which go on under another recipe or with other data if that is forced.
        prediction_inputs: reference of ``prediction_inputs(model, run, cohort, out, *, prior_labels, batch_size,
            max_ram)``, what new images bring beside them, or a `DataError` that says what is wrong with it, by case.
        mechanisms: reference of ``mechanisms(model)``, the table of what the network is made of, for ``trifuse audit``.
        probe: reference of ``probe(encoder, data, out, *, seeds, steps, width, device)``, which draws what the blocks
            of an encoder know of a cohort; one network has it.
        run_inputs: reference of ``run_inputs(model, run, cohort, case_ids)``, what cases of a finished run bring beside
            their images; nothing is trained for it.
        input_shapes: reference of ``input_shapes(config, side)``, the shape of each such input, without the batch.
        phantom: reference of ``write(out, **wishes)``, which writes the cohort of ``trifuse data phantom`` and returns
            its split; one network has it.
        demo, ablation, converters, pretrainings, quick: what else commands offer.
    """

    name: str
    package: str
    summary: str
    network: str
    recipe: str
    fit: str
    title: str
    report: str = ""
    paper: str = ""
    protocol: str = ""
    paper_tables: str = ""
    decisions: str = ""
    variants: tuple[str, ...] = ()
    shown_defaults: Mapping[str, str] = field(default_factory=dict)
    options: tuple[OptionGroup, ...] = ()
    defaults: str = ""
    check: str = ""
    sigmoid: bool = False
    training_inputs: str = ""
    prediction_inputs: str = ""
    mechanisms: str = ""
    probe: str = ""
    run_inputs: str = ""
    input_shapes: str = ""
    phantom: str = ""
    demo: Demo | None = None
    ablation: Ablation | None = None
    converters: tuple[Converter, ...] = ()
    pretrainings: tuple[Pretraining, ...] = ()
    quick: Quick | None = None

    def load(self, reference: str, default: Any = None) -> Any:
        """Import what a reference names; ``default`` stands for an empty one."""
        if not reference:
            return default
        file, _, name = reference.partition(":")
        return getattr(import_module(f"{self.package}.{file}"), name)
