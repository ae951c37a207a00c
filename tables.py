"""Rows of bench.json as a Markdown table, and the ratios they are read for. Used by bench.py and experiments/report.py."""

COLUMNS = (("pipeline", "{}"), ("method", "{}"), ("mode", "{}"), ("model", "{}"), ("image_size", "{}"), ("precision", "{}"), ("compiled", "{}"),
           ("source_images_per_step", "{}"), ("source_images_per_second", "{:.1f}"), ("composites_per_second", "{:.1f}"),
           ("ms_per_step", "{:.1f}"), ("ms_per_step_quartiles", "{0[0]:.0f}-{0[1]:.0f}"), ("peak_memory_bytes", "{:.2e}"), ("gmacs_per_source_image", "{:.3f}"),
           ("share_of_matmul_rate", "{:.0%}"), ("hours_per_imagenet_epoch", "{:.2f}"),
           ("images_per_second_per_core", "{:.0f}"), ("over_plain", "{:.2f}"))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, without the columns that none of them fills."""
    columns = [(name, form) for name, form in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join("" if row.get(name) is None else form.format(row[name]) for name, form in columns) + " |")
    return "\n".join(lines)


RATIOS = (("greenmim", "simmim", "visible units only"), ("eesmm", "greenmim", "superposition"), ("eesmm", "simmim", "both"),
          ("eesmm compiled", "simmim", "both"), ("simmim", "simmim on timm", "our SimMIM over the peer's"),
          ("eesmm", "simmim on timm", "both, over the peer"), ("eesmm compiled", "simmim on timm", "both, over the peer"),
          ("dense", "torchvision", "dense"), ("dense compiled", "torchvision", "dense"), ("dense", "timm", "dense"))


def ratios(rows: list[dict]) -> list[str]:
    """The two savings apart, visible units only and superposition, and what stands beside peers; a line each."""
    lines, settings = [], ("model", "image_size", "precision", "source_images_per_step", "mode")
    for setting in dict.fromkeys(tuple(row.get(k) for k in settings) for row in rows if "method" in row):
        same = [row for row in rows if setting == tuple(row.get(k) for k in settings)]
        speed = {row["method"] + " compiled" * row["compiled"]: row["source_images_per_second"] for row in same}
        memory = {row["method"] + " compiled" * row["compiled"]: row.get("peak_memory_bytes") for row in same}
        where = f"{setting[2]}, {setting[3]} images a step" + (f", {setting[4]}" if setting[4] else "")
        lines += [f"{what} ({where}): {over} / {under} = {speed[over]:.1f} / {speed[under]:.1f} = {speed[over] / speed[under]:.2f} x"
                  for over, under, what in RATIOS if over in speed and under in speed]
        if memory.get("eesmm") and memory.get("simmim"):
            lines.append(f"peak memory ({where}): eesmm / simmim = {memory['eesmm'] / 1e9:.2f} GB / {memory['simmim'] / 1e9:.2f} GB = "
                         f"{memory['eesmm'] / memory['simmim']:.0%}")
    return lines
