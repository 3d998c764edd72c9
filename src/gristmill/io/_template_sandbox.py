"""The closed world in which chat templates run; see `gristmill.io.chat` for what it promises.

Templates hold plain JSON values and a few of Jinja's own. Whatever makes a new value (an operator, call,
filter, slice, literal or block) goes through `made`, which bounds its size; what could make a much larger one
is estimated first. So no single step is long. Every pass of a loop, call, access to an item, comparison,
filter and test looks at the clock, and all that is made counts against the room of one rendering.

Marks before the characters of messages are hidden from what templates compare, count, search and cut.

Imports Jinja, so it is itself imported on use.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import chain
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from gristmill.errors import TemplateError

if TYPE_CHECKING:
    from gristmill.io.chat import TemplateLimits

__all__ = ["Sandbox"]

_MAX_INT_BITS = 256
_MAX_RANGE = 100_000
_MAX_WIDTH = 1000
_MAX_DEPTH = 128
_MAX_SEARCH = 1 << 26
_REFUSED = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
_DATE_FORMAT = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%])*")
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[^%A-Za-z]*?(?:\*|\d{4})")

_CUTTING = {"partition", "rpartition", "rsplit", "split", "splitlines"}
_PADDING = {"center", "ljust", "rjust", "zfill"}
_STRIPPING = {"lstrip", "rstrip", "strip"}
_TELLING = {
    *("count", "endswith", "find", "index", "rfind", "rindex", "startswith"),
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
    *("isnumeric", "isprintable", "isspace", "istitle", "isupper"),
}
_CHANGING = {"capitalize", "casefold", "lower", "removeprefix", "removesuffix", "swapcase", "title", "upper"}
_MEMBERS: dict[type, set[str]] = {
    str: {"format", "join", "replace"} | _CUTTING | _PADDING | _STRIPPING | _TELLING | _CHANGING,
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
    tuple: {"count", "index"},
    LoopContext: {
        *("changed", "cycle", "depth", "depth0", "first", "index", "index0", "last"),
        *("length", "nextitem", "previtem", "revindex", "revindex0"),
    },
}
_PLAIN_FILTERS = (
    *("abs", "attr", "capitalize", "d", "default", "dictsort", "e", "escape", "float", "forceescape", "int"),
    *("items", "lower", "map", "max", "min", "reject", "rejectattr", "safe", "select", "selectattr", "sort"),
    *("title", "truncate", "unique", "upper", "wordcount"),
)


class _LimitError(Exception):
    """The template exceeded a limit or did what is not allowed here."""


class _Refusal(Exception):
    """The template called raise_exception."""


class _Namespace(Namespace):
    """Jinja's namespace, which may hold others of its kind; its text must not spell them out."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _apply(name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class _Instrument(NodeTransformer):
    """Leads through filters, whose names no template can write, what Jinja has no hook for."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _apply("gm-each", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _apply("gm-read", node.expr)
        for operand in node.ops:
            operand.expr = _apply("gm-read", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _apply("gm-slice", node.node, *(end or nodes.Const(None, lineno=node.lineno) for end in ends))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _apply("gm-concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        loaded: nodes.Node = node if getattr(node, "ctx", "load") != "load" else _apply("gm-made", node)
        return loaded

    visit_Tuple = visit_Dict = visit_List

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _REFUSED):
            raise _LimitError(f"it uses '{type(node).__name__.lower()}', which chat templates may not")
        return super().generic_visit(node, *args, **kwargs)


class _Formatter(SandboxedFormatter):
    """str.format with bounded widths, for text and numbers only."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec) or not isinstance(value, (str, int, float)):
            raise _LimitError("it formats with too large a width, or a value that is not text or a number")
        return str(super().format_field(value, format_spec))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with a clock, bounded values, and only the listed attributes, filters and globals."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, controls: frozenset[str]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            # Constant expressions are not worked out while compiling, where nothing is counted.
            optimized=False,
            cache_size=0,
            auto_reload=False,
            finalize=pass_context(lambda _context, value: self.text(value)),
        )
        self._controls = controls
        self.marker = ""
        self._most = self._left = 0
        self._deadline = 0.0
        self._formatter = _Formatter(self)
        self.globals = {
            "range": self._range,
            "dict": lambda *args, **kwargs: self.made(dict(*args, **kwargs)),
            "namespace": self._namespace,
            "raise_exception": self._raise_exception,
            "strftime_now": self._strftime_now,
        }
        tests: Mapping[str, Any] = TESTS
        self.tests = {name: self._test(test) for name, test in tests.items()}
        self.filters = {name: self._filter(filter_) for name, filter_ in self._own_filters().items()}

    # ---- limits --------------------------------------------------------------------------------------------

    def start(self, limits: TemplateLimits, input_size: int, marker: str) -> None:
        """Begin a rendering with fresh limits."""
        self.marker = marker
        self._most = limits.extra_chars + limits.input_factor * input_size
        self._left = limits.total_factor * self._most
        self._deadline = time.monotonic() + limits.seconds

    def tick(self) -> None:
        """Look at the clock; called at every step."""
        if time.monotonic() > self._deadline:
            raise _LimitError("it takes too long")

    def room(self, size: int) -> None:
        """Check that a value of this size may be built."""
        if size > self._most:
            raise _LimitError("it builds too large a value")

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Size of a value and all in it, repeated parts counted each time; fails if it is too large."""
        if isinstance(value, str):
            return 1 + len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 1
        if depth > _MAX_DEPTH:
            raise _LimitError("it builds a value that is nested too deeply")
        total = 1
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            total += self.weigh(item, depth + 1)
            self.room(total)
        return total

    def made(self, value: Any) -> Any:
        """A value that the template made, if it is within limits."""
        self.tick()
        if isinstance(value, str):
            # A mark at the end marks nothing; before text of the template it would.
            value = str.__str__(value.rstrip(self.marker) if self.marker else value)
            self.room(len(value))
            self._occupy(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
            self._occupy(16 * len(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise _LimitError("it computes too large a number")
        return value

    def _occupy(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _LimitError("it builds too much text")

    def text(self, value: Any) -> str:
        """str(value); the only way a value becomes output."""
        self.tick()
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple, dict)):
            self.weigh(value)
            return str(self.made(str(value)))
        if value is None or isinstance(value, (int, float, range, Undefined)):
            return str(value)
        raise _LimitError(f"it writes a value of type {type(value).__name__}")

    def read(self, value: Any) -> Any:
        """A value as templates should see it."""
        self.tick()
        return value.replace(self.marker, "") if self.marker and isinstance(value, str) else value

    def characters(self, value: Any) -> Any:
        """The characters of a text, each with the mark before it; other values unchanged."""
        if not self.marker or not isinstance(value, str):
            return value
        return re.findall(f"{self.marker}*[^{self.marker}]", value)

    def each(self, items: Any) -> Iterator[Any]:
        """The items, with a look at the clock for each."""
        for item in self.characters(items):
            self.tick()
            yield item

    # ---- hooks of Jinja ------------------------------------------------------------------------------------

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a template, macro or block wrote, piece by piece."""
        return str(self.made("".join(self._within(parts))))

    def _within(self, parts: Iterable[str]) -> Iterator[str]:
        total = 0
        for part in parts:
            self.tick()
            total += len(part)
            self.room(total)
            yield part

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self.room(self.weigh(value) * times)
        elif (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and abs(right) * max(left.bit_length(), 1) > 2 * _MAX_INT_BITS
        ):
            raise _LimitError("it computes too large a number")
        return self.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        if attribute.startswith("__"):
            raise _LimitError(f"it reaches for {attribute[:40]!r}")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(self.characters(obj) if isinstance(argument, int) else obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, _Namespace):
            return not attr.startswith("_")
        return attr in _MEMBERS.get(type(obj), ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise _LimitError(f"it reaches for {attribute[:40]!r} of a value of type {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """Formatting is bounded in `call`."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        if isinstance(__obj, BuiltinMethodType):
            # Jinja adds these to calls inside of loops, for functions that want a context.
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __self._method(__obj.__self__, __obj.__name__, args, kwargs)
        if isinstance(__obj, LoopContext):
            args = tuple(map(__self.each, args))
        return __context.call(__obj, *args, **kwargs)

    # ---- methods of values ---------------------------------------------------------------------------------

    def _method(self, obj: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a method of one of `_MEMBERS`."""
        if not isinstance(obj, str):
            result = getattr(obj, name)(*args, **kwargs)
            return self.made(list(result) if name in ("items", "keys", "values") else result)
        if name == "replace":
            return self._replace(obj, *args)
        if name == "join":
            return self._join(args[0], obj)
        if name == "format":
            return self._format(obj, args, kwargs)
        if name in _TELLING:
            obj, args = self.read(obj), tuple(map(self.read, args))
        elif name in _PADDING and args:
            self.room(args[0])
        sign = args[0] if args and isinstance(args[0], str) else ""
        # Some searches take time in proportion to the product of both lengths.
        if (name in _STRIPPING or name.startswith("r")) and len(obj) * len(sign) > _MAX_SEARCH:
            raise _LimitError(f"it gives too long a text to {name}")
        if name in _CUTTING:
            if self.marker and any(text.startswith(sign) and text != sign for text in self._controls if sign):
                # The sign may be put back and then begin a special token, so what follows it is marked.
                obj = obj.replace(self.marker + sign, sign + self.marker)
            parts = getattr(obj, name)(*args, **kwargs)
            return self.made(type(parts)(map(self.made, parts)))
        return self.made(getattr(obj, name)(*args, **kwargs))

    def _replace(self, obj: str, old: str, new: str, count: int = -1) -> Any:
        self.room(len(obj) + obj.count(old) * len(new))
        return self.made(obj.replace(old, new, count))

    def _join(self, items: Any, separator: Any = "", attribute: Any = None) -> Any:
        if attribute is not None:
            items = map(filters.make_attrgetter(self, attribute), items)
        texts = [self.text(item) for item in self.each(items)]
        self.room(sum(map(len, texts)) + len(separator) * len(texts))
        return self.made(separator.join(texts))

    def _room_for_fields(self, pattern: str, sign: str, values: Any) -> None:
        """Check that every field of a format could take the size of all values."""
        self.room(len(pattern) + pattern.count(sign) * (self.weigh(values) + _MAX_WIDTH))

    def _format(self, pattern: str, args: Any, kwargs: Any) -> Any:
        self._room_for_fields(pattern, "{", (args, kwargs))
        return self.made(self._formatter.vformat(pattern, args, kwargs))

    def _percent(self, pattern: str, values: Any) -> Any:
        self._room_for_fields(pattern, "%", values)
        if _WIDE_PERCENT.search(pattern):
            raise _LimitError("it formats with too large a width")
        return self.made(pattern % values)

    # ---- globals -------------------------------------------------------------------------------------------

    def _range(self, *args: Any) -> range:
        numbers = range(*args)
        if len(numbers) > _MAX_RANGE:
            raise _LimitError(f"it counts over a range of more than {_MAX_RANGE}")
        return numbers

    def _namespace(self, *args: Any, **kwargs: Any) -> _Namespace:
        self._occupy(_MAX_WIDTH)
        return _Namespace(*args, **kwargs)

    def _raise_exception(self, message: Any = "") -> None:
        raise _Refusal(self.text(message))

    def _strftime_now(self, pattern: Any) -> str:
        if not isinstance(pattern, str) or len(pattern) > 256 or not _DATE_FORMAT.fullmatch(pattern):
            raise _LimitError("it formats the date in a way that is not supported")
        return datetime.now().strftime(pattern)

    # ---- filters and tests ---------------------------------------------------------------------------------

    def _test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            return function(*map(self.read, args))

        return run

    def _filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            return self.each(result) if isinstance(result, Iterator) else self.made(result)

        return run

    def _own_filters(self) -> dict[str, Callable[..., Any]]:
        """All filters that exist, with Jinja's meaning except that `tojson` is Hugging Face's."""
        text, plain = self.text, filters.FILTERS
        return {
            **{name: plain[name] for name in _PLAIN_FILTERS},
            "center": lambda value, width=80: self._method(text(value), "center", (width,), {}),
            "count": lambda value: len(self.read(value)),
            "first": lambda value: filters.do_first(self, self.characters(value)),
            "format": lambda value, *args, **kwargs: self._percent(text(value), kwargs or args),
            "indent": self._indent,
            "join": lambda value, d="", attribute=None: self._join(value, text(d), attribute),
            "last": lambda value: filters.do_last(self, self.characters(value)),
            "length": lambda value: len(self.read(value)),
            "list": lambda value: list(self.each(value)),
            "replace": lambda value, old, new, count=None: self._replace(
                text(value), text(old), text(new), -1 if count is None else count
            ),
            "reverse": lambda value: (
                "".join(reversed(self.characters(value)))
                if isinstance(value, str)
                else filters.do_reverse(value)
            ),
            "round": self._round,
            "string": text,
            "sum": self._sum,
            "tojson": self._tojson,
            "trim": lambda value, chars=None: self._method(text(value), "strip", (chars,), {}),
            "urlencode": lambda value: plain["urlencode"](self.read(text(value))),
            "gm-concat": self._join,
            "gm-each": self.each,
            "gm-made": self.made,
            "gm-read": self.read,
            "gm-slice": self._slice,
        }

    def _slice(self, value: Any, *ends: Any) -> Any:
        cut = self.characters(value)[slice(*ends)]
        return "".join(cut) if isinstance(value, str) else cut

    def _indent(self, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
        value = self.text(value)
        step = len(width) if isinstance(width, str) else width
        self.room(len(value) + step * (len(value.splitlines()) + 1))
        return filters.do_indent(value, width, first, blank)

    def _round(self, value: Any, precision: Any = 0, method: Any = "common") -> Any:
        if not isinstance(precision, int) or abs(precision) > 30:
            raise _LimitError("it rounds to too many digits")
        return filters.do_round(value, precision, method)

    def _sum(self, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            value = map(filters.make_attrgetter(self, attribute), value)
        for item in self.each(value):
            start = self.made(start + item)
        return start

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        for size in (indent, *(separators or ())):
            if (len(size) if isinstance(size, str) else size or 0) > 32:
                raise _LimitError("it writes JSON with too much space")
        self.weigh(value)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # Piece by piece, since indentation multiplies the size.
        result = "".join(self._within(encoder.iterencode(value)))
        if ensure_ascii and self.marker:
            result = result.replace(json.dumps(self.marker)[1:-1], self.marker)
        return result


class Sandbox:
    """One compiled template. Not safe for use from several threads at once."""

    def __init__(self, source: str, controls: frozenset[str] = frozenset()) -> None:
        """controls: the texts that marks keep apart. Raises TemplateError if the source is not valid Jinja or
        uses what does not exist here."""
        self._environment = _Environment(controls)
        try:
            tree = _Instrument().visit(self._environment.parse(source))
            tree.set_environment(self._environment)
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template is not valid, line {error.lineno}: {_one_line(error.message)}"
            raise TemplateError(message) from None
        except _LimitError as error:
            raise TemplateError(f"the chat template is refused: {_one_line(error)}") from None
        except (Exception, RecursionError, MemoryError) as error:
            # Python's own limits on nesting and on numbers show only when the generated code is compiled.
            raise TemplateError(f"the chat template cannot be compiled: {_describe(error)}") from None

    def render(self, values: Mapping[str, Any], limits: TemplateLimits, input_size: int, marker: str) -> str:
        """The text of the template for these values, all of plain JSON types. Raises TemplateError.

        input_size is the size of the values, in characters and items; marker, if not "", is the character
        whose places must survive.
        """
        environment = self._environment
        environment.start(limits, input_size, marker)
        try:
            context = self._template.new_context(dict(values))
            return environment.concat(self._template.root_render_func(context))
        except _Refusal as error:
            raise TemplateError(f"the chat template refuses the messages: {_one_line(error)}") from None
        except _LimitError as error:
            raise TemplateError(f"the chat template is stopped: {_one_line(error)}") from None
        except (Exception, RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template fails: {_describe(error)}") from None


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())[:300]
    return "".join(character if character.isprintable() else "?" for character in text)


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _one_line(error) or type(error).__name__
