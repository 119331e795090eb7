export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
cp .gpu_data/a/smollm2.gguf.0 /tmp/; python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu_data/a/whl/*.whl && export PYTHONPATH=/tmp/site
timeout 70 python3 -c "
from benchmarks.sparse_gpu import *
b=Benchmark('x'); 
import time
t=time.time()
try: check_values(b)
except BaseException as e: import traceback; traceback.print_exc()
for r in b.rows: print(r.metric, r.ours, r.met)
print('values',time.time()-t)
" > $OUT/values.txt 2>&1; tail -35 $OUT/values.txt
timeout 50 python3 .gpu/sweep2.py 32768 > $OUT/sweep2.txt 2>&1; cat $OUT/sweep2.txt | tail -20
