"""Ask about a picture and print the answer as it comes.

python examples/ask.py examples/images/text.png "What does it say?" [model]
"""

import sys

from mlx_vlm_edge import UsageError, load, stream_generate

if len(sys.argv) < 3:
    sys.exit(__doc__)
picture, question, *name = sys.argv[1:]
try:
    model, processor = load(*name or ["demo"])
    for chunk in stream_generate(model, processor, question, images=[picture], max_tokens=128):
        print(chunk.text, end="", flush=True)
except UsageError as error:  # no such picture, no such model: the line says what to do
    sys.exit(str(error))
print(f"\n{chunk.ttft_e2e * 1000:.0f} ms to the first token, {chunk.generation_tps:.0f} tokens/s")
