"""Renders one untrusted chat template in a process that may be killed. Run as a script, never imported.

stdin: one JSON object {path, source, variables, seconds, bytes, characters}; stdout: {"text": ...} or {"error": ...}.
jinja2's immutable sandbox keeps a template from reaching Python; it does not bound time or memory (9**(9**9) and
string repetition run on), so the kernel does: an alarm without a handler ends the process even inside one long
operation, and the address space is limited. Knows nothing of kvfold.
"""

import json
import resource
import signal
import sys


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class RefusedByTemplate(TemplateError):
        """raise_exception was called."""

    class Generation(Extension):
        """{% generation %} marks what an assistant says in training; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):  # type: ignore[no-untyped-def]
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise RefusedByTemplate(str(message))

    def strftime_now(format: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(format)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # type: ignore[no-untyped-def]
        """As Hugging Face's: no HTML escapes, unlike jinja2's own."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now

    for limit, amount in (
        (resource.RLIMIT_AS, request["bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (amount, amount))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    pieces: list[str] = []
    room = request["characters"]
    try:
        for piece in environment.from_string(request["source"]).generate(**request["variables"]):
            room -= len(piece)
            if room < 0:
                raise RefusedByTemplate(f"it wrote more than {request['characters']} characters")
            pieces.append(piece)
        reply = {"text": "".join(pieces)}
    except MemoryError:
        pieces.clear()
        reply = {"error": f"it needed more than {request['bytes'] >> 20} MiB"}
    except RecursionError:
        reply = {"error": "it calls itself without end"}
    except Exception as error:  # whatever a template can raise is the template's error
        reply = {"error": f"{type(error).__name__}: {error}"[:500]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.write(json.dumps(reply))


if __name__ == "__main__":
    main()
