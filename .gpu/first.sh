export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
python3 - <<'P'
import importlib
for m in ("jax","flax","optax","orbax.checkpoint","jaxtyping","tokenizers","safetensors","jinja2","pydantic","tqdm","matplotlib","tensorboard","scipy"):
    try: importlib.import_module(m)
    except Exception as e: print("MISSING",m,e)
P
timeout 60 python3 -c "
from benchmarks.sparse_gpu import *
b=Benchmark('x'); 
import time
t=time.time()
try: check_values(b)
except BaseException as e: import traceback; traceback.print_exc()
for r in b.rows: print(r.metric, r.ours, r.met)
print('values',time.time()-t)
" 2>&1 | tail -60 > $OUT/values.txt; tail -45 $OUT/values.txt
timeout 110 python3 .gpu/sweep.py 32768 > $OUT/sweep32.txt 2>&1; cat $OUT/sweep32.txt | tail -40
