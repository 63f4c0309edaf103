"""The loss curve of a run as a small SVG picture."""

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 44, 40
LINES = (("train_loss", "train", "#1f77b4"), ("val_loss", "valid", "#d62728"))


def svg(log: list[dict], best_iteration: int | None) -> str:
    """Training and validation loss (nats per answer token) by iteration, of the rows of a log."""
    points = {name: [(r["iteration"], r[name]) for r in log if name in r] for name, _, _ in LINES}
    every = [point for line in points.values() for point in line]
    last = max([1, *(x for x, _ in every)])
    highest = max([1e-3, *(y for _, y in every)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / last * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - y / highest * (HEIGHT - TOP - BOTTOM), 1)

    def text(x: float, y: float, content: str, anchor: str, colour: str = "#444") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{content}</text>'

    def line(corners: list[tuple[float, float]], style: str) -> str:
        joined = " ".join(f"{x},{y}" for x, y in corners)
        return f'<polyline points="{joined}" fill="none" {style}/>'

    parts = [line([place(0, highest), place(0, 0), place(last, 0)], 'stroke="#444"')]
    parts += [
        text(LEFT - 6, place(0, y)[1] + 4, f"{y:.2g}", "end") for y in (0, highest / 2, highest)
    ]
    parts += [text(place(x, 0)[0], HEIGHT - 22, str(x), "middle") for x in (0, last // 2, last)]
    parts.append(text(WIDTH / 2, HEIGHT - 6, "iteration", "middle"))
    if best_iteration is not None:
        x = place(best_iteration, 0)[0]
        parts.append(line([(x, TOP), (x, HEIGHT - BOTTOM)], 'stroke="#999" stroke-dasharray="2 3"'))
        parts.append(text(x, TOP - 6, "least valid loss", "end"))
    for column, (name, label, colour) in enumerate(LINES):
        if points[name]:
            parts.append(line([place(*p) for p in points[name]], f'stroke="{colour}"'))
            parts.append(text(WIDTH - RIGHT - 40 * column, 16, label, "end", colour))
    parts.append(text(LEFT, 16, "loss per answer token, nats", "start"))
    style = 'font-family="sans-serif" font-size="12"'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'
