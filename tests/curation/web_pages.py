"""Web pages and archives to test with, written here from scratch."""

import gzip

PROSE = (
    "The lighthouse keeper wrote down the weather every evening, and he did so for more than forty years. "
    "His notebooks tell of storms and of calm seas, of ships that came too near and of birds that rested on the rail. "
    "Historians of the climate have since read them with care, because few records of that coast are so complete."
)

CODE = (
    "def newton(f, df, x):\n    for _ in range(10):\n        x -= f(x) / df(x)\n    return x\n\nprint(newton(1, 2, 3))"
)

MATH_PAGE = f"""<html><head><title>Roots</title></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav>
<article><h1>Newton's method</h1>
<p>{PROSE}</p>
<p>The update is <math><semantics><mrow><mi>x</mi></mrow><annotation encoding="application/x-tex">x_{{n+1}} = x_n
</annotation></semantics></math> and one repeats it until the change is small enough for the purpose at hand.</p>
<pre><code class="language-python">{CODE}</code></pre>
<p>As one can see, <code>newton</code> needs only few steps to reach the precision of the machine, if all is well.</p>
<p><span class="katex-display"><span class="katex"><span class="katex-mathml"><math display="block"><semantics>
<mi>E</mi><annotation encoding="application/x-tex">E = mc^2</annotation></semantics></math></span>
<span class="katex-html">E=mc2</span></span></span></p>
<p><span class="MathJax">a2</span><script type="math/tex">a^2</script> is the square that is meant here.</p>
</article><footer>Copyright 2024. All rights reserved.</footer></body></html>"""


def page(text: str) -> str:
    """A page with navigation around a text."""
    return (
        "<html><head><title>x</title></head><body><nav><a href='/'>Home</a> <a href='/b'>Blog</a></nav>"
        f"<article>{''.join(f'<p>{part}</p>' for part in text.split(chr(10)))}</article></body></html>"
    )


def warc_record(url: str, body: bytes, *, status: int = 200, content_type: str = "text/html; charset=utf-8") -> bytes:
    """A response as a crawler stores it."""
    http = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    return _record("response", url, "application/http; msgtype=response", http)


def wet_record(url: str, text: str) -> bytes:
    """A text as Common Crawl's WET files hold it."""
    return _record("conversion", url, "text/plain", text.encode())


def _record(kind: str, url: str, content_type: str, block: bytes) -> bytes:
    identity = url.rpartition("/")[2].rjust(8, "0")
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-02T03:04:05Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{identity}>\r\nContent-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def gzipped(records: list[bytes]) -> bytes:
    """One gzip member per record, as archives have it."""
    return b"".join(map(gzip.compress, records))
