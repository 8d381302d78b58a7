"""Makes `import kernels` mean this package in this process, and keeps transformers from taking it for another.

Hugging Face has a distribution whose import name is also `kernels`. Where it is installed, an editable install of ours
comes behind it on the import path; and transformers, which goes by the version of the *distribution* called `kernels`,
would import that one's classes from our package. One finder at the front of sys.meta_path answers both questions: where
the package is, and which version of the distribution there is ("0+axpo", older than any that transformers accepts, so
that it does without).

Packages beside `kernels` run this file before they import anything else (an import would already need the answer):

    runpy.run_path(str(Path(__file__).resolve().parent.parent / "kernels" / "_claim.py"))

Importing it does the same. Either is done once; neither imports torch.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path

NAME = "kernels"
PACKAGE = Path(__file__).resolve().parent


class Distribution(importlib.metadata.Distribution):
    """What importlib.metadata finds under the name `kernels`."""

    def read_text(self, filename):
        return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0+axpo\n" if filename == "METADATA" else None

    def locate_file(self, path):
        return PACKAGE.parent / path


class Finder(importlib.metadata.DistributionFinder):
    """Finds this package, and its stand-in distribution, before anything else of that name."""

    package = PACKAGE

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        return importlib.util.spec_from_file_location(
            NAME, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
        )

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        return [Distribution()] if context.name == NAME else []


def claim() -> None:
    """Installs the finder, once a process, and gives up a `kernels` that was imported from elsewhere before."""
    if any(getattr(finder, "package", None) == PACKAGE for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Finder())
    loaded = getattr(sys.modules.get(NAME), "__file__", None)
    if NAME in sys.modules and (loaded is None or Path(loaded).resolve().parent != PACKAGE):
        warnings.warn(
            f"the package `kernels` of {loaded} was imported before axpo's and gives way to it: transformers keeps "
            "working, without kernels from the Hub. To avoid this import engine or axpo before transformers",
            stacklevel=2,
        )
        for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
            del sys.modules[name]
    probe = getattr(sys.modules.get("transformers.utils.import_utils"), "is_kernels_available", None)
    forget = getattr(probe, "cache_clear", None)
    if forget is not None:
        forget()


claim()
