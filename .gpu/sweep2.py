exec(open('.gpu/sweep.py').read().split("print('tables'")[0])
from kernels_pallas.block_sparse_attention import pallas_gpu as pg
at=functools.partial(block_sparse_attention,block_size=64)
fwd=jax.jit(at)
out,lse=jax.jit(lambda q,k,v,i: block_sparse_attention(q,k,v,i,block_size=64,return_lse=True))(q,k,v,ids)
W=lambda a,b,c:{2:dict(forward=a,dq=b,dkv=c)}
for rows,w,stg in ((64,W(4,4,8),2),(64,W(4,4,4),2),(64,W(4,4,8),3),(64,W(4,4,4),1),(128,W(8,8,8),2),(128,W(8,8,8),3)):
    pg.GPU_ROWS={2:rows};pg.GPU_WARPS=w;pg.GPU_STAGES=stg
    jax.clear_caches()
    try:
        print('fwd',rows,w,stg,t(at,q,k,v,ids),flush=True)
        print('both',rows,w,stg,t(with_gradients(at),q,k,v,dout,ids),flush=True)
    except Exception as e: print(rows,w,stg,str(e)[:300],flush=True)
