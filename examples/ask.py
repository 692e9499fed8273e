"""Ask about a picture and print the answer as it comes.

python examples/ask.py examples/images/text.png "What does it say?" [model]
"""

import sys

from mlx_vlm_edge import load, stream_generate

if len(sys.argv) < 3:
    sys.exit(__doc__)
picture, question, *name = sys.argv[1:]
model, processor = load(*name or ["demo"])
for chunk in stream_generate(model, processor, question, images=[picture], max_tokens=128):
    print(chunk.text, end="", flush=True)
print(f"\n{chunk.ttft_e2e * 1000:.0f} ms to the first token, {chunk.generation_tps:.0f} tokens/s")
