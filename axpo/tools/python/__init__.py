"""`python`: a stateful interpreter per trajectory, in a sandbox, with the conversation's images at hand."""

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from axpo.tools import Tool, ToolResult
from axpo.tools.python.host import Isolation, Kernel, KernelDied, SandboxError, Zygote

MAX_CALL_S = 60


class Python(Tool):
    """Runs cells like a notebook: variables stay from call to call, and die with the trajectory.

    Args:
        sandbox: "bubblewrap", or "none" to run the model's code unprotected.
        memory_mb: memory of a kernel, in MiB.
        cpu_seconds: processor time of a kernel's whole life.
        max_output_chars: printed text that the model is shown of a call.

    Raises:
        ValueError: the sandbox is wanted and cannot be had here.
    """

    name: ClassVar[str] = "python"
    description: ClassVar[str] = (
        "Executes Python code in a stateful notebook kernel; variables persist between calls. Standard output, errors, "
        "the value of a last expression and figures shown by plt.show() are returned. All images of the conversation "
        "are preloaded in the list _pil_images as PIL images and in _images as NumPy arrays. There is no network, and "
        "files cannot be written."
    )
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "description": "The Python code to execute."},
            "timeout": {
                "type": "number",
                "description": "Seconds after which the code is stopped.",
                "default": 12,
                "exclusiveMinimum": 0,
                "maximum": MAX_CALL_S,
            },
        },
        "required": ["code"],
    }

    def __init__(
        self,
        sandbox: Isolation = "bubblewrap",
        memory_mb: int = 512,
        cpu_seconds: int = 120,
        max_output_chars: int = 8000,
    ):
        try:
            self._zygote = Zygote(sandbox, memory_mb << 20, cpu_seconds)
        except SandboxError as error:
            raise ValueError(
                f"python.sandbox = 'bubblewrap': {error}. Or set python.sandbox to 'none', which runs the model's code "
                "unprotected"
            ) from None
        self._max_chars = max_output_chars

    def session(self) -> "PythonSession":
        return PythonSession(Kernel(self._zygote), self._max_chars)

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        """One cell in a kernel of its own."""
        session = self.session()
        try:
            return session.run(arguments, images)
        finally:
            session.close()

    def close(self) -> None:
        self._zygote.close()


class PythonSession(Tool):
    """One trajectory's kernel."""

    name, description, parameters = Python.name, Python.description, Python.parameters

    def __init__(self, kernel: Kernel, max_chars: int):
        self._kernel = kernel
        self._max_chars = max_chars

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        timeout, begun = float(arguments.get("timeout", 12)), time.monotonic()
        try:
            cell = self._kernel.run(arguments["code"], timeout, images, self._max_chars)
        except KernelDied as error:
            return ToolResult.failure(
                f"the kernel was stopped: {error}. The next call starts a new one, without variables",
                timed_out=error.timed_out,
            )
        except SandboxError as error:
            return ToolResult.failure(f"the python tool is not available: {error}")
        if cell.ok:
            return ToolResult(True, cell.text or ("" if cell.images else "(no output)"), cell.images)
        # By our clock too: what a kernel says of itself may be the model's own words.
        late = (cell.error or "").startswith("TimeoutError") and time.monotonic() - begun >= timeout
        return ToolResult(False, cell.text, cell.images, cell.error, timed_out=late)

    def close(self) -> None:
        self._kernel.close()
