"""From bytes to a `Picture`: open, orient, tile.

    open.py        a path, bytes, URL, PIL image or array -> an upright RGB image and its sha256
    colour.py      any Pillow mode or NumPy array -> 8-bit RGB over white
    fetch.py       an http(s) URL -> bytes, with limits
    preprocess.py  an RGB image -> a view, as SigLIP, CLIP and LLaVA-1.5 make it
    tiling.py      an RGB image -> the views that a `TilingConfig` asks for
    dynamic.py     InternVL's tiles
    anyres.py      LLaVA-NeXT's and LLaVA-1.5-HD's
    slices.py      MiniCPM-V's and LLaVA-UHD's, which differ in size
    picture.py     `Picture`, `Features`, and how a picture is cut into views

Nothing here touches MLX: worker threads may run all of it.
"""
