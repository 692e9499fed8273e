"""Put two pictures into one question, each where it belongs in the text.

python examples/compare.py before.jpg after.jpg [model]

The default, fastvlm-0.5b, is downloaded (1.5 GB) when it is not on the machine.
"""

import sys

from mlx_vlm_edge import UsageError, generate, load

if len(sys.argv) < 3:
    sys.exit(__doc__)
before, after, *name = sys.argv[1:]
content = [
    {"type": "text", "text": "Before:"},
    {"type": "image"},
    {"type": "text", "text": "After:"},
    {"type": "image"},
    {"type": "text", "text": "What has changed?"},
]
messages = [{"role": "user", "content": content}]
try:
    model, processor = load(*name or ["fastvlm-0.5b"])
    print(generate(model, processor, messages, images=[before, after], max_tokens=128))
except UsageError as error:  # no network, say: the line says what to do
    sys.exit(str(error))
