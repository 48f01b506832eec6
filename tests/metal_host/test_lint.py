"""The lint's rules, each with a text that breaks it and one that does not; and the rewriting, which keeps lines."""

import pytest

from metal_kernels.host import CompileError
from metal_kernels.host.lint import lint
from metal_kernels.host.rewrite import rewrite
from metal_kernels.host.tokens import tokenize

BAD = [
    ("", "float* p = a;", "address space"),
    ("", "const float * p = a;", "address space"),
    ("", "T& r = a[0];", "address space"),
    ("", "float x = *(const float*)(a + 1);", "address space"),
    ("", "float4 *p = (device float4*)a;", "address space"),
    ("struct State { float h; };", "State* p = a;", "address space"),
    ("inline float first(const float* p) { return p[0]; }", "", "address space"),
    ("inline void swap_(thread float& a, float& b) {}", "", "address space"),
    ("", "double x = 1;", "double"),
    ("", "goto end;", "goto"),
    ("", "float x = std::exp(1.0f);", "std::"),
    ("", "static float x = 1;", "static"),
    ("", "auto f = [&](float x) { return x; };", "lambda"),
    ("", "atomic_store_explicit(&o[0], 1, memory_order_seq_cst);", "relaxed"),
    ("", "float x = 1; // \u00b5", "ASCII"),
    ("float scale = 2.0f;", "", "constant address space"),
    ("constexpr int table[2] = {1, 2};", "", "constant address space"),
    ("template <int N> constexpr int twice = 2 * N;", "", "constant address space"),
    ("namespace ours { constexpr int n = 2; }", "", "constant address space"),
    ("threadgroup float shared_[32];", "", "threadgroup variable"),
]
GOOD = [
    ("", "device const float* p = a; threadgroup float* q = t; thread float& r = x; constant int* s = n;"),
    ("", "float x = a * b; bool y = a & b; float z = float(a) * float(b); int n = sizeof(float) * m;"),
    ("", "const device T* p = reinterpret_cast<const device T*>(a); auto q = (device float4*)(o + 4);"),
    ("constant float scale = 2.0f; constexpr constant int table[2] = {1, 2};", "o[0] = scale;"),
    ("template <typename T, int N = 3> inline T twice(T x) { T y = x; return y + x; }", ""),
    ("template <class T> struct pair { T a, b; pair(T x = T(0)) : a(x), b(x) {} };", ""),
    ("namespace ours { inline float f(device const float* p) { float x = 1; return x * p[0]; } }", ""),
    ("using real = float; typedef float real2; enum kind { first = 1 };\n#define N 3", "static constant float pi = 3;"),
    ("", "int new_row = 1, doubled = 2, standard = 3; // double, goto and std::exp in a comment"),
]


@pytest.mark.parametrize(("header", "source", "message"), BAD)
def test_what_metal_lacks_is_found(header: str, source: str, message: str) -> None:
    findings = lint(header, source, ["T"])
    assert [message in str(finding) for finding in findings] == [True], findings


@pytest.mark.parametrize(("header", "source"), GOOD)
def test_what_metal_has_is_not(header: str, source: str) -> None:
    assert lint(header, source, ["T"]) == []


def test_findings_name_part_and_line() -> None:
    (finding,) = lint("", "uint i;\n\ndouble x;")
    assert str(finding) == "source line 3: 'double': Metal has no double"


@pytest.mark.parametrize(
    ("metal", "cpp"),
    [
        ("x = 1.0 + .5 + 1e-3 + 2.;", "x = 1.0f + .5f + 1e-3f + 2.f;"),
        ("x = 1.0f + 2 + 0x1F + 3u + 1.5L;", "x = 1.0f + 2 + 0x1F + 3u + 1.5L;"),
        ("x = 1.0h + 2bf;", "x = half(1.0f) + bfloat(2.0f);"),
        ('s = "1.0"; // 1.0', 's = "1.0"; // 1.0'),
        ("threadgroup float t[4][8];", "MSL_THREADGROUP_VARIABLE(0, float, t, [ 4 ] [ 8 ]); "),
        (
            "{ threadgroup atomic<uint> n; threadgroup T a[2], b; }",
            "{ MSL_THREADGROUP_VARIABLE(0, atomic < uint >, n, );  "
            "MSL_THREADGROUP_VARIABLE(1, T, a, [ 2 ]); MSL_THREADGROUP_VARIABLE(2, T, b, );  }",
        ),
        ("threadgroup float* p = t;", "threadgroup float* p = t;"),
        ("f((threadgroup float*)t);", "f((threadgroup float*)t);"),
        ('template [[host_name("k")]] [[kernel]] decltype(k<1>) k<1>;', "template decltype(k<1>) k<1>;"),
    ],
)
def test_rewriting(metal: str, cpp: str) -> None:
    assert rewrite(metal) == cpp


def test_rewriting_keeps_lines() -> None:
    text = "int a;\nthreadgroup float\n  t[4],\n  u;\nint b; /* two\nlines */ int c;\n"
    assert [rewrite(text).split("\n").index(line) for line in ("int a;", "int b; /* two", "lines */ int c;")] == [
        0,
        4,
        5,
    ]


def test_tokens_join_to_the_text() -> None:
    text = 'a->b /* c\n*/ "s\\"t" 0x1F 1e-3f #not\n#define X \\\n 1\n[[kernel]] x <<= \'c\''
    assert "".join(token.text for token in tokenize(text)) == text


def test_threadgroup_variables_have_no_initialiser() -> None:
    with pytest.raises(CompileError, match="line 2: threadgroup variable 't' has an initialiser"):
        rewrite("int a;\nthreadgroup float t = 0;")


def test_too_many_threadgroup_variables() -> None:
    with pytest.raises(CompileError, match="65 threadgroup variables"):
        rewrite("".join(f"threadgroup float t{i};" for i in range(65)))
