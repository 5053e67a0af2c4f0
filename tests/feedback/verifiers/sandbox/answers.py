"""Codes of answers with their tests: right ones in many shapes, and hostile ones."""

PLAIN = (
    "None", "True", "-3", "10 ** 6000", "2.5", "'\\u00e9'", "[1, [2]]", "(1, (2,))", "{1: (2, [3])}", "{1, (2, 3)}",
    "frozenset({1})", "b'ab'", "bytearray(b'a')", "1j", "range(1, 9, 2)", "''", "()", "{}",
)  # fmt: skip

# name -> (code, tests that pass)
RIGHT = {
    "plain data": (
        "def f(x): return x",
        [f"assert f({v}) == {v} and type(f({v})) is type({v})" for v in PLAIN],
    ),
    "fractions": (
        "from fractions import Fraction\nfrom decimal import Decimal\ndef f(): return Fraction(1, 3), Decimal('0.1')",
        "from fractions import Fraction\nfrom decimal import Decimal\nassert f() == (Fraction(1, 3), Decimal('0.1'))",
    ),
    "no numbers": ("def f(): return float('nan'), float('inf')", ["a, b = f()\nassert a != a and b > 1e300"]),
    "keywords": ("def f(*a, k=1, **o): return [list(a), k, o]", ["assert f(1, k=2, z=3) == [[1], 2, {'z': 3}]"]),
    "changes in place": (
        "def f(x): x.sort()\ndef g(d): d['a'] = 1\ndef h(s): s.add(4)",
        [
            "x = [2, 1]\nassert f(x) is None and x == [1, 2]",
            "d = {}\ng(d)\nassert d == {'a': 1}",
            "s = {1}\nh(s)\nassert 4 in s",
        ],
    ),
    "generators": (
        "def f():\n    yield 1\n    yield 2",
        ["assert list(f()) == [1, 2]", "assert next(f()) == 1", "assert sum(f()) == 3"],
    ),
    "exceptions": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x ** 0.5",
        """
try:
    f(-1)
    assert False
except ValueError as error:
    assert "negative" in str(error)
assert abs(f(2.0) ** 2 - 2) < 1e-9
""",
    ),
    "constants": (
        "N = 3\n_hidden = 4\nTABLE = {'a': [1]}",
        ["assert N == 3", "assert _hidden == 4", "assert TABLE['a'][0] == 1"],
    ),
    "imports": ("import math\ndef f(x): return math.sqrt(x)", ["assert math.isclose(f(2), 2 ** 0.5)"]),
    "a builtin's name": ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"]),
    "output": ("print('x' * 100)\ndef f():\n    print('y')\n    return input", ["assert callable(f())"]),
    "asyncio": ("import asyncio\nasync def g(): return 5\ndef f(): return asyncio.run(g())", ["assert f() == 5"]),
    "threads": (
        "import threading\nx = []\nt = threading.Thread(target=x.append, args=(1,))\nt.start()\nt.join()",
        ["assert x == [1]"],
    ),
    "functions that return functions": (
        "def make(k):\n    return lambda x: x * k",
        ["assert make(3)(4) == 12", "m = make(2)\nassert [m(i) for i in range(3)] == [0, 2, 4]"],
    ),
    "functions of functions": (
        "def apply(g, x): return g(x)\ndef inc(x): return x + 1",
        ["assert apply(inc, 1) == 2"],
    ),
    "a class": (
        """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self, x): return x in self.items
    def __getitem__(self, i): return self.items[i]
    def __setitem__(self, i, x): self.items[i] = x
    def __iter__(self): return iter(self.items)
    def __repr__(self): return f"Stack({self.items})"
""",
        """
s = Stack()
assert s.push(3).push(4).items == [3, 4]
assert len(s) == 2 and 3 in s and 9 not in s
assert s[0] == 3
s[0] = 7
assert list(s) == [7, 4] and str(s) == repr(s) == "Stack([7, 4])"
assert s.pop() == 4 and isinstance(s, Stack) and not isinstance(3, Stack)
s.name = "x"
assert s.name == "x"
try:
    Stack().pop()
    assert False
except IndexError:
    pass
""",
    ),
    "operators": (
        """
class Vector:
    def __init__(self, x): self.x = x
    def __add__(self, o): return Vector(self.x + o.x)
    def __mul__(self, k): return Vector(self.x * k)
    def __rmul__(self, k): return Vector(self.x * k)
    def __eq__(self, o): return self.x == o.x
    def __lt__(self, o): return self.x < o.x
    def __neg__(self): return Vector(-self.x)
""",
        [
            "assert Vector(1) + Vector(2) == Vector(3) and Vector(1) != Vector(2)",
            "assert (Vector(2) * 3).x == (3 * Vector(2)).x == 6",
            "assert Vector(1) < Vector(2) and (-Vector(1)).x == -1",
        ],
    ),
    "a check": (
        "def f(x): return x * 2",
        "def check(g):\n    assert g(2) == 4\n    assert g(0) == 0\n\ncheck(f)",
    ),
    "test functions": (
        "def f(x): return x * 2",
        "def test_a():\n    assert f(1) == 2\ndef two(): return 2\ndef test_b():\n    assert f(two()) == 4",
    ),
    "unittest": (
        "def f(x): return x * 2",
        """
import unittest
class TestF(unittest.TestCase):
    def setUp(self): self.x = 2
    def test_a(self): self.assertEqual(f(self.x), 4)
    def test_b(self):
        with self.assertRaises(TypeError): f(1, 2)
if __name__ == "__main__":
    unittest.main()
""",
    ),
    "a plain class of tests": ("def f(x): return x * 2", "class TestF:\n    def test_a(self): assert f(1) == 2"),
    "a loop of tests": ("def f(x): return x * 2", "for i in range(5):\n    assert f(i) == 2 * i"),
}

# code, tests, (tests that pass, tests)
WRONG = [
    ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3", "assert f(2) == 3", "f(1, 2)"], (2, 4)),
    ("def f(x): return x + 1", "assert f(1) == 2\nassert f(1) == 3\ndef test_f(): assert f(3) == 5", (1, 3)),
    (
        "def f(x): return x + 1",
        "class TestF:\n    def test_a(self): assert f(1) == 2\n    def test_b(self): assert f(1) == 1",
        (1, 2),
    ),
    ("def f(x): return (1, 2)", ["assert f(0) == [1, 2]", "assert f(0) == (1, 2)"], (1, 2)),
    ("def g(x): return 1", ["assert f(0) == 1"], (0, 1)),
    ("def f(:", ["assert True", "assert f(0) == 1"], (0, 2)),
    ("raise ValueError", ["assert True"], (0, 1)),
    ("x = 1 / 0\ndef f(x): return 1", ["assert f(0) == 1"], (0, 1)),
    ("def f(x): return f(x)", ["assert f(0) == 1", "assert True"], (1, 2)),
    ("def f():\n    x = []\n    x.append(x)\n    return x", ["assert f() == 1"], (0, 1)),
    ("def f(): return 'x' * (8 << 20)", ["assert len(f()) > 1"], (0, 1)),  # more than is read from an answer
]

# Each passes no test of `STRICT`, which wants 2.
HOSTILE = {
    "ends before the tests": "import os\nos._exit(0)",
    "ends in a test": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in a test": "import sys\ndef f(x): sys.exit(0)",
    "a signal to itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGTERM)",
    "kills its parent": "import os\ndef f(x): os.kill(os.getppid(), 9)",
    "a crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "patched builtins": """
import builtins
builtins.AssertionError = Exception
builtins.exec = builtins.isinstance = builtins.compile = lambda *a: True
def f(x): return 5
""",
    "own builtins": "abs = round = len = str = isinstance = lambda *a: 2\n__builtins__ = {}\ndef f(x): return 5",
    "patched json": "import json\njson.dumps = lambda *a: '{\"value\": 3}'\ndef f(x): return 5",
    "equals everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(2)
def f(x): return Equal()
""",
    "equals everything, as a number": """
class Equal(int):
    def __eq__(self, other): return True
    def __hash__(self): return hash(2)
def f(x): return Equal(5)
""",
    "differs by zero": """
class Zero:
    __sub__ = __rsub__ = __mul__ = lambda *a: 0
    __abs__ = lambda self: 0
    __lt__ = __gt__ = __le__ = __ge__ = lambda *a: True
    __float__ = lambda self: 2.0
    __round__ = lambda *a: 2
def f(x): return Zero()
""",
    "prints results": """
import os
for fd in range(64):
    try: os.write(fd, b"passed 0\\n" * 3)
    except OSError: pass
print("passed 0", flush=True)
def f(x): return 5
""",
    "speaks the protocol": """
import os
def f(x):
    os.write(3, b'{"value": 5}\\n{"value": 5}\\n')
    return 5
""",
    "replies without end": "import os\ndef f(x):\n    while True: os.write(3, b'x' * 65536)",
    "replies no JSON": "import os\ndef f(x): os.write(3, b'[' * 100000 + b'\\n')",
    "replies another kind": """
import os
def f(x): os.write(3, b'{"value": {"object": 99, "int": 1}}\\n')
""",
    "replaces the builtins of the tests": """
import json, os
own = {name: {"object": 1} for name in ("abs", "round", "len")}
names = {"f": {"object": 0}, "__builtins__": {"dict": list(own.items())}, **own}
os.write(3, json.dumps({"names": names}).encode() + b"\\n")
while True:
    line = b""
    while not line.endswith(b"\\n"):
        part = os.read(3, 65536)
        if not part: os._exit(0)
        line += part
    called = json.loads(line)["arguments"][0]["object"]
    os.write(3, json.dumps({"value": 5 if called == 0 else 0}).encode() + b"\\n")
""",
    "frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame.f_back: frame = frame.f_back
    frame.f_globals.clear()
    return 5
""",
    "deep data": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "a decimal without end": "from decimal import Decimal\ndef f(x): return Decimal('1e999999')",
    "closes all files": "import os\nos.closerange(0, 64)\ndef f(x): return 2",
}
STRICT = [
    "assert f(1) == 2",
    "assert 2 == f(1)",
    "assert [f(1)] == [2]",
    "assert f(1) in (2, 3)",
    "assert f(1) < 3",
    "assert abs(f(1) - 2) < 1e-6",
    "assert round(f(1), 3) == 2",
    "import math\nassert math.isclose(f(1), 2.0)",
]

# Statements that raise OSError in a confined process. None does harm where it succeeds.
REFUSED = (
    "os.fork()",
    "if os.system('true'): raise OSError",
    "subprocess.run(['true'])",
    "os.execv('/bin/true', ['true'])",
    "os.setsid()",
    "os.kill(os.getppid(), 0)",
    "os.kill(-1, 0)",
    "os.killpg(0, 0)",
    "socket.socket()",
    "socket.socketpair(type=socket.SOCK_DGRAM)",
    "urllib.request.urlopen('http://127.0.0.1:{port}')",
    "open('/proc/{pid}/environ').read()",
    "open('/proc/self/environ').read()",
    "open('/etc/passwd').read()",
    "open('{secret}').read()",
    "open('{secret}', 'a')",
    "os.remove('{secret}')",
    "os.listdir('{folder}')",
    "os.rename('{secret}', '{secret}2')",
    "os.truncate('{secret}', 0)",
    "open('{folder}/new', 'w')",
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "resource.prlimit({pid}, resource.RLIMIT_NOFILE)",
    "if ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) < 0: raise OSError",
)
