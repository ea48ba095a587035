"""From bytes to a `Picture`: open, orient, tile.

    open.py        a path, bytes, URL, PIL image or array -> an upright RGB image and its sha256
    colour.py      any Pillow mode or NumPy array -> 8-bit RGB over white
    video.py       an animation or a video file -> frames, evenly sampled
    fetch.py       an http(s) URL -> bytes, with limits
    preprocess.py  an RGB image -> a view, as SigLIP, CLIP and LLaVA-1.5 make it
    tiling.py      an RGB image -> the views that a `TilingConfig` asks for
    dynamic.py     InternVL's tiles
    whole.py       EVE's view in the picture's own shape, and its teacher's
    anyres.py      LLaVA-NeXT's and LLaVA-1.5-HD's
    cover.py       MM1.5's
    slices.py      MiniCPM-V's and LLaVA-UHD's, which differ in size
    picture.py     `Picture`, `Features`, and how a picture is cut into views

Nothing here touches MLX: worker threads may run all of it.
"""
