"""The closed world in which chat templates run; see `gristmill.io.chat` for what it promises.

Imports Jinja, so it is itself imported on use.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import filters as jinja_filters
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
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
_MAX_STRIP_CHARS = 256
_MAX_WIDTH = 1000
_MAX_FORMAT = 1 << 16
_CLOCK_EVERY = 64
_LONG = 4096
_REFUSED = {
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "import",
    nodes.Extends: "extends",
    nodes.Block: "block",
}
_DATE_FORMAT = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%])*")
_PERCENT_SIZES = re.compile(r"%(?:\([^)]{0,99}\))?[-#0 +]{0,9}(\*|\d+)?(?:\.(\*|\d+))?")
_PLAIN_STR_METHODS = frozenset(
    {
        *("capitalize", "casefold", "lower", "swapcase", "title", "upper"),
        *("endswith", "startswith", "removeprefix", "removesuffix"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
        *("isnumeric", "isprintable", "isspace", "istitle", "isupper"),
        *("count", "find", "index", "partition", "split", "splitlines"),
    }
)
_BACKWARD_STR_METHODS = frozenset({"rfind", "rindex", "rpartition", "rsplit"})
_STRIP_STR_METHODS = frozenset({"lstrip", "rstrip", "strip"})
_PAD_STR_METHODS = frozenset({"center", "ljust", "rjust", "zfill"})
_LOOP_VALUES = frozenset(
    {
        *("depth", "depth0", "first", "index", "index0", "last"),
        *("length", "nextitem", "previtem", "revindex", "revindex0"),
    }
)
# Tests whose time grows with everything inside their arguments.
_DEEP_TESTS = frozenset(
    {
        *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan"),
        *("ge", ">=", "<", "lt", "lessthan", "<=", "le"),
    }
)
_DEEP_FILTERS = ("dictsort", "max", "min", "sort", "unique")


class _LimitError(Exception):
    """The template exceeded a limit or did what is not allowed here."""


class _Refusal(Exception):
    """The template called raise_exception."""


class _Namespace(Namespace):
    """Jinja's namespace, which may hold others of its kind; its text must not spell them out."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Method:
    """A method or function that templates may call."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __repr__(self) -> str:
        return "<method>"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Instrument(NodeTransformer):
    """Adds the counting and size checks that Jinja has no hook for.

    The filters it inserts have names that no template can write.
    """

    def _apply(self, name: str, node: Any) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _count_body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = self._apply("gm-tick", nodes.Const(None, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._count_body(node)
        if node.test is not None:
            # The body is not reached for items that the condition leaves out.
            node.test = self._apply("gm-guard", node.test)
        return node

    visit_Macro = visit_CallBlock = _count_body

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._apply("gm-weigh", node.expr)
        for operand in node.ops:
            operand.expr = self._apply("gm-weigh", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._apply("gm-guard", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._apply("gm-concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def _size(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._apply("gm-sized", node)

    visit_List = visit_Tuple = visit_Dict = _size

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        for kind, name in _REFUSED.items():
            if isinstance(node, kind):
                raise _LimitError(f"it uses '{name}', which chat templates may not")
        return super().generic_visit(node, *args, **kwargs)


class _Formatter(SandboxedFormatter):
    """str.format with bounded widths, for text and numbers only."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if any(int(digits[:9]) > _MAX_WIDTH for digits in re.findall(r"\d+", format_spec)):
            raise _LimitError("it formats with too large a width")
        if format_spec and not isinstance(value, (str, int, float)):
            raise _LimitError(f"it formats a value of type {type(value).__name__}")
        return str(super().format_field(value, format_spec))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with counted steps, bounded values, and only the listed attributes, filters and globals."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            # Constant expressions are not worked out while compiling, where nothing is counted.
            optimized=False,
            cache_size=0,
            auto_reload=False,
        )
        self.marker = ""
        self._operations = self._next_look = self._chars = self.limit = 0
        self._deadline = 0.0
        self.finalize = pass_context(lambda _context, value: self.text(value))
        self.globals = {
            "range": _Method(self._range),
            "dict": _Method(self._dict),
            "namespace": _Method(_Namespace),
            "raise_exception": _Method(self._raise_exception),
            "strftime_now": _Method(self._strftime_now),
        }
        self.filters = self._make_filters()
        tests: Mapping[str, Callable[..., Any]] = TESTS
        self.tests = {
            name: self._counted(test, self.weighed if name in _DEEP_TESTS else self.guard)
            for name, test in tests.items()
        }
        self._formatter = _Formatter(self)

    # ---- budget --------------------------------------------------------------------------------------------

    def start(self, limits: TemplateLimits, input_chars: int, marker: str) -> None:
        """Begin a rendering with a fresh budget."""
        self.marker = marker
        self.limit = limits.extra_chars + limits.input_factor * input_chars
        self._chars = limits.total_factor * self.limit
        self._operations = self._next_look = limits.operations
        self._deadline = time.monotonic() + limits.seconds

    def spend(self, size: int = 1) -> None:
        """Count one step over `size` characters or items."""
        self._operations -= 1 + (size >> 6)
        if self._operations < 0:
            raise _LimitError("it takes too many steps")
        if size > _LONG or self._operations < self._next_look:
            self._next_look = self._operations - _CLOCK_EVERY
            if time.monotonic() > self._deadline:
                raise _LimitError("it takes too long")

    def room(self, size: int) -> None:
        """Check that a value of this size may be built."""
        if size > self.limit:
            raise _LimitError("it builds too large a value")

    def built(self, text: str) -> str:
        """Account for new text."""
        self.room(len(text))
        self.spend(len(text))
        self._occupy(len(text))
        return text

    def _occupy(self, size: int) -> None:
        self._chars -= size
        if self._chars < 0:
            raise _LimitError("it builds too much text")

    def weigh(self, value: Any) -> int:
        """Size of a value and all in it, repeated parts counted each time; fails if it is too large."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 1
        total, pending = 0, [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                total += 1 + len(item)
            elif isinstance(item, (list, tuple)):
                total += 1 + len(item)
                pending.extend(item)
            elif isinstance(item, dict):
                total += 1 + len(item)
                pending.extend(item)
                pending.extend(item.values())
            else:
                total += 1
            if total > self.limit:
                raise _LimitError("it builds too large a value")
        self.spend(total << 3)
        return total

    def weighed(self, value: Any) -> Any:
        """The value, once everything in it is counted."""
        self.spend(self.weigh(value))
        return value

    def checked(self, value: Any) -> Any:
        """A value that an operation produced, if it is within limits."""
        if isinstance(value, str):
            return self.built(value)
        if isinstance(value, (list, tuple, dict)):
            # A list takes memory for each item, not only for the characters in it.
            self._occupy(8 * len(value) + self.weigh(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise _LimitError("it computes too large a number")
        return value

    def text(self, value: Any) -> str:
        """str(value); the only way a value becomes output."""
        if isinstance(value, str):
            self.spend(len(value))
            return value
        if isinstance(value, (list, tuple, dict)):
            self.spend(self.weigh(value))
            return self.built(str(value))
        return str(value)

    # ---- hooks of Jinja ------------------------------------------------------------------------------------

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a macro or block wrote."""
        return self.built("".join(self._counted_parts(parts)))

    def _counted_parts(self, parts: Iterable[str]) -> Iterator[str]:
        total = 0
        for part in parts:
            total += len(part)
            self.room(total)
            yield part

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.spend()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self.room(self.weigh(value) * max(times, 0))
        elif operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                self.room(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._room_for_power(left, right)
        return self.checked(super().call_binop(context, operator, left, right))

    def _room_for_power(self, base: int, exponent: int) -> None:
        if abs(exponent) * max(base.bit_length(), 1) > 2 * _MAX_INT_BITS:
            raise _LimitError("it computes too large a number")

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._member(obj, attribute, method_first=True)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._member(obj, argument, method_first=False)

    def _member(self, obj: Any, name: Any, method_first: bool) -> Any:
        self.spend()
        if method_first and (method := self._method(obj, name)) is not None:
            return method
        if isinstance(obj, (dict, list, tuple, str, range)):
            try:
                return obj[name]
            except (TypeError, LookupError):
                pass
        elif isinstance(obj, _Namespace) and isinstance(name, str) and not name.startswith("_"):
            try:
                return getattr(obj, name)
            except AttributeError:
                pass
        elif isinstance(obj, LoopContext) and name in _LOOP_VALUES:
            return getattr(obj, name)
        elif isinstance(obj, Undefined) and not str(name).startswith("_"):
            return getattr(obj, str(name))
        if not method_first and (method := self._method(obj, name)) is not None:
            return method
        return self.undefined(obj=obj, name=name)

    def _method(self, obj: Any, name: Any) -> _Method | None:
        """The method of a value that templates may call, None if there is none of this name."""
        if isinstance(obj, str):
            return self._str_method(obj, name)
        if isinstance(obj, dict):
            if name == "get":
                return _Method(obj.get)
            if name in ("items", "keys", "values"):
                return _Method(lambda: self.checked(list(getattr(obj, name)())))
        elif isinstance(obj, (list, tuple)) and name in ("count", "index"):
            return _Method(lambda *args: (self.weigh(obj), self.weigh(args), getattr(obj, name)(*args))[-1])
        elif isinstance(obj, LoopContext) and name in ("changed", "cycle"):
            return _Method(getattr(obj, name))
        return None

    def _str_method(self, obj: str, name: str) -> _Method | None:
        if name == "replace":
            return _Method(functools.partial(self._replace, obj))
        if name == "join":
            return _Method(functools.partial(self._join_method, obj))
        if name == "format":
            return _Method(functools.partial(self._format_method, obj))
        if name in _PAD_STR_METHODS:
            return _Method(functools.partial(self._pad, obj, name))
        if name in _PLAIN_STR_METHODS | _BACKWARD_STR_METHODS | _STRIP_STR_METHODS:
            return _Method(functools.partial(self._run_str_method, obj, name))
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.spend()
        if isinstance(__obj, _Method):
            return __obj.run(*args, **kwargs)
        if isinstance(__obj, (Macro, LoopContext, Undefined)):
            return __context.call(__obj, *args, **kwargs)
        raise _LimitError(f"it calls a value of type {type(__obj).__name__}")

    # ---- methods of text -----------------------------------------------------------------------------------

    def _run_str_method(self, obj: str, name: str, *args: Any, **kwargs: Any) -> Any:
        longest = max((self.weigh(arg) for arg in args), default=0)
        if name in _STRIP_STR_METHODS and longest > _MAX_STRIP_CHARS:
            raise _LimitError(f"it gives too long a text to {name}")
        if name in _BACKWARD_STR_METHODS:
            # Searching backwards takes time in proportion to the product of both lengths.
            self.spend(len(obj) * max(longest, 1))
        self.spend(len(obj) + longest)
        return self.checked(getattr(obj, name)(*args, **kwargs))

    def _replace(self, obj: str, old: Any, new: Any, count: Any = -1) -> Any:
        if isinstance(old, str) and isinstance(new, str) and isinstance(count, int):
            times = obj.count(old) if count < 0 else min(obj.count(old), count)
            self.room(len(obj) + times * len(new))
        return self.checked(obj.replace(old, new, count))

    def _join_method(self, obj: str, items: Any) -> str:
        return self._join_texts(obj, [*self._each(items)])

    def _join_texts(self, separator: str, items: list[Any]) -> str:
        self.room(sum(map(len, items)) + len(separator) * max(len(items) - 1, 0))
        return self.built(separator.join(items))

    def _pad(self, obj: str, name: str, width: Any, *fill: Any) -> Any:
        if isinstance(width, int):
            self.room(width)
        return self.checked(getattr(obj, name)(width, *fill))

    def _format_method(self, obj: str, *args: Any, **kwargs: Any) -> str:
        self._room_for_fields(obj, "{", (args, kwargs))
        return self.built(self._formatter.vformat(obj, args, kwargs))

    def _percent(self, left: str, right: Any) -> Any:
        self._room_for_fields(left, "%", right)
        for sizes in _PERCENT_SIZES.findall(left):
            if "*" in sizes or any(int(size[:9]) > _MAX_WIDTH for size in sizes if size):
                raise _LimitError("it formats with too large a width")
        return self.checked(left % right)

    def _room_for_fields(self, pattern: str, sign: str, values: Any) -> None:
        """Check that every field of a format could take the size of all values."""
        fields = pattern.count(sign)
        if len(pattern) > _MAX_FORMAT:
            raise _LimitError("it formats with too long a pattern")
        self.room(len(pattern) + fields * (self.weigh(values) + _MAX_WIDTH))
        self.spend(len(pattern))

    # ---- globals -------------------------------------------------------------------------------------------

    def _range(self, *args: Any) -> range:
        numbers = range(*args)
        if len(numbers) > _MAX_RANGE:
            raise _LimitError(f"it counts over a range of more than {_MAX_RANGE}")
        return numbers

    def _dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.checked(dict(*args, **kwargs))

    def _raise_exception(self, message: Any = "") -> None:
        raise _Refusal(self.text(message))

    def _strftime_now(self, pattern: Any) -> str:
        if not isinstance(pattern, str) or len(pattern) > 256 or not _DATE_FORMAT.fullmatch(pattern):
            raise _LimitError("it formats the date in a way that is not supported")
        return datetime.now().strftime(pattern)

    # ---- filters and tests ---------------------------------------------------------------------------------

    def _counted(
        self, function: Callable[..., Any], count: Callable[[Any], Any] | None = None
    ) -> Callable[..., Any]:
        """The same filter or test, with its arguments counted and its result checked."""
        count = count or self.guard

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.spend()
            for value in (*args, *kwargs.values()):
                count(value)
            return self.checked(function(*args, **kwargs))

        return run

    def guard(self, value: Any) -> Any:
        """Count the reading of a value."""
        if isinstance(value, (str, list, tuple, dict)):
            self.spend(len(value))
        else:
            self.spend()
        return value

    def _each(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.spend()
            yield item

    def _make_filters(self) -> dict[str, Callable[..., Any]]:
        """All filters that exist, with Jinja's meaning except that `tojson` is Hugging Face's."""
        text = self.text
        plain = jinja_filters.FILTERS
        counted = {
            name: self._counted(plain[name])
            for name in (
                *("abs", "capitalize", "d", "default", "e", "escape", "first", "float", "forceescape"),
                *("last", "lower", "safe", "title", "truncate", "upper", "wordcount"),
            )
        }
        counted |= {name: self._counted(plain[name], self.weighed) for name in _DEEP_FILTERS}
        counted["int"] = self._counted(self._int)
        return {
            **counted,
            # These call other filters, tests and item access, which are counted themselves.
            **{name: plain[name] for name in ("map", "reject", "rejectattr", "select", "selectattr")},
            "attr": lambda obj, name: self.getattr(obj, str(name)),
            "center": lambda value, width=80: self._pad(text(value), "center", width),
            "count": self._length,
            "format": lambda value, *args, **kwargs: self._percent(text(value), kwargs or args),
            "indent": self._indent,
            "items": lambda value: [] if isinstance(value, Undefined) else self.checked(list(value.items())),
            "join": self._join,
            "length": self._length,
            "list": lambda value: self.checked([*self._each(value)]),
            "replace": lambda value, old, new, count=None: self._replace(
                text(value), text(old), text(new), -1 if count is None else count
            ),
            "reverse": self._reverse,
            "round": self._round,
            "string": text,
            "sum": self._sum,
            "tojson": self._tojson,
            "trim": lambda value, chars=None: self._run_str_method(text(value), "strip", chars),
            "urlencode": lambda value: self.checked(plain["urlencode"](text(value).replace(self.marker, ""))),
            "gm-concat": lambda parts: self._join_texts("", [text(part) for part in parts]),
            "gm-guard": self.guard,
            "gm-sized": self.checked,
            "gm-tick": lambda _: self.spend(),
            "gm-weigh": self.weighed,
        }

    def _length(self, value: Any) -> int:
        # Markers are no part of the text.
        return len(value) - (value.count(self.marker) if self.marker and isinstance(value, str) else 0)

    def _int(self, value: Any, default: int = 0, base: int = 10) -> Any:
        if isinstance(value, str) and len(value) > _MAX_INT_BITS:
            return default
        return jinja_filters.do_int(value, default, base)

    def _indent(self, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
        value = self.text(value)
        step = len(width) if isinstance(width, str) else width
        self.room(len(value) + step * (value.count("\n") + 1 + value.count("\r")))
        return self.checked(jinja_filters.do_indent(value, width, first, blank))

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(jinja_filters.make_attrgetter(self, attribute), value)
        return self._join_texts(self.text(d), [self.text(item) for item in self._each(value)])

    def _reverse(self, value: Any) -> Any:
        return self.checked(value[::-1] if isinstance(value, str) else [*self._each(value)][::-1])

    def _round(self, value: Any, precision: Any = 0, method: Any = "common") -> Any:
        if not isinstance(precision, int) or abs(precision) > 30:
            raise _LimitError("it rounds to too many digits")
        return jinja_filters.do_round(value, precision, method)

    def _sum(self, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            value = map(jinja_filters.make_attrgetter(self, attribute), value)
        if isinstance(start, str):
            raise _LimitError("it adds texts with 'sum'")
        for item in self._each(value):
            self.room(self.weigh(start) + self.weigh(item))
            start = self.checked(start + item)
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
        self.spend(self.weigh(value))
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # Piece by piece, since indentation multiplies the size.
        result = self.built("".join(self._counted_parts(encoder.iterencode(value))))
        if ensure_ascii and self.marker:
            result = result.replace(json.dumps(self.marker)[1:-1], self.marker)
        return result


class Sandbox:
    """One compiled template. Not safe for use from several threads at once."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError if the source is not valid Jinja or uses what does not exist here."""
        self._environment = _Environment()
        try:
            tree = _Instrument().visit(self._environment.parse(source))
            tree.set_environment(self._environment)
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template is not valid, line {error.lineno}: {_one_line(error.message)}"
            raise TemplateError(message) from None
        except _LimitError as error:
            raise TemplateError(f"the chat template is refused: {error}") from None
        except (Exception, RecursionError, MemoryError) as error:
            # Python's own limits on nesting and on numbers show only when the generated code is compiled.
            raise TemplateError(f"the chat template cannot be compiled: {_describe(error)}") from None

    def render(self, values: Mapping[str, Any], limits: TemplateLimits, input_chars: int, marker: str) -> str:
        """The text of the template for these values, all of plain JSON types. Raises TemplateError.

        input_chars is the size of the values; marker, if not "", is the character whose spelling must
        survive.
        """
        environment = self._environment
        environment.start(limits, input_chars, marker)
        try:
            context = self._template.new_context(dict(values))
            return environment.concat(self._template.root_render_func(context))
        except _Refusal as error:
            raise TemplateError(f"the chat template refuses the messages: {_one_line(error)}") from None
        except _LimitError as error:
            raise TemplateError(f"the chat template is stopped: {error}") from None
        except (Exception, RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template fails: {_describe(error)}") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _one_line(error) or type(error).__name__
