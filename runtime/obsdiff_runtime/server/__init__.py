"""Bundles over HTTP: OpenAI's images API, health, metrics and a page.

    orders    what one request asks for, what becomes of it, and the events that tell of it
    batcher   one thread a model: images join and leave runs of the denoiser at step boundaries
    schemas   requests, responses and errors in OpenAI's shape
    limits    bodies that are too large or too slow
    metrics   what Prometheus scrapes
    app       the routes
    run       a process that serves until it is told to stop

`orders` and `batcher` need nothing but the runtime; the rest needs `pip install 'obsdiff-runtime[serve]'`.
"""
