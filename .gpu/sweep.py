import sys, time, functools, statistics
sys.path.insert(0, '.')
import jax, jax.numpy as jnp
from benchmarks.sparse_gpu import *
from kernels_pallas.block_sparse_attention import pallas_gpu as pg, tile_unions as tu
from kernels_pallas.block_selection import pallas_gpu as sg, tuned_block_sizes as st
from kernels_pallas.query_tiles import QueryTiles
print(jax.devices(), jax.__version__)
def t(f,*a):
    f=jax.jit(f); 
    b=time.time(); jax.block_until_ready(f(*a)); c=time.time()-b
    return f"{1e3*seconds(lambda: f(*a),3):.2f} ms (compile {c:.1f})"
L=int(sys.argv[1])
q,k,v=layer_inputs(32,2,128,L,"bfloat16")
dout=jax.random.normal(jax.random.key(1),q.shape,q.dtype)
ids=jax.block_until_ready(choose(q,k,SELECTION))
print('union 4', union_ratio(np.asarray(ids[0,0]),4), 'union 8', union_ratio(np.asarray(ids[0,0]),8),flush=True)
tiles,keys=pg._layout(q,k,64)
print('tables', t(lambda ids: pg._tables(tiles,keys,ids,jnp.broadcast_to(jnp.arange(L,dtype=jnp.int32),(1,L)),None),ids),flush=True)
tab=jax.jit(lambda ids: pg._tables(tiles,keys,ids,jnp.broadcast_to(jnp.arange(L,dtype=jnp.int32),(1,L)),None))(ids)
print('turned', t(lambda a,b: tu.block_tiles(a,b,keys.num_blocks),tab.ids,tab.words),flush=True)
print('to_rows', t(tiles.to_rows,q),flush=True)
S=SELECTION
fine=compress_keys(k,kernel_size=32,kernel_stride=16); coarse=compress_keys(k,kernel_size=128,kernel_stride=64)
pos=jnp.broadcast_to(jnp.arange(L,dtype=jnp.int32),(1,L)); z=jnp.zeros_like(pos)
span=min(L,16384)
print('select whole', t(lambda q,k: choose(q,k,SELECTION),q,k),flush=True)
for rows,chunk,w,stg in ((64,32,4,2),(64,64,8,2),(64,32,4,3),(64,32,8,2),(128,32,8,2),(64,32,4,1)):
    sg.GPU_ROWS={2:rows};sg.GPU_CHUNK={2:chunk};sg.GPU_WARPS={2:w};sg.GPU_STAGES=stg
    try: print('scores',rows,chunk,w,stg,t(lambda q,f,c: sg._scores(q[:,-span:],f,c,128**-.5,S,pos[:,-span:],z[:,-span:],L//64,False),q,fine,coarse),flush=True)
    except Exception as e: print('scores',rows,chunk,w,stg,str(e)[:200],flush=True)
sg.GPU_ROWS={2:64};sg.GPU_CHUNK={2:32};sg.GPU_WARPS={2:4};sg.GPU_STAGES=2
sc=jax.jit(lambda q,f,c: sg._scores(q[:,-span:],f,c,128**-.5,S,pos[:,-span:],z[:,-span:],L//64,False))(q,fine,coarse)
print('best', t(lambda s: sg._best(s,S,pos[:,-span:],z[:,-span:],L//64,False),sc), '(of',span,'queries)',flush=True)
at=functools.partial(block_sparse_attention,block_size=64)
for rows,w,stg in ((64,8,2),(64,4,2),(64,4,3),(64,8,3),(128,8,2),(128,8,3)):
    pg.GPU_ROWS={2:rows};pg.GPU_WARPS={2:w};pg.GPU_STAGES=stg
    jax.clear_caches()
    try:
        print('fwd',rows,w,stg,t(at,q,k,v,ids),flush=True)
        print('both',rows,w,stg,t(with_gradients(at),q,k,v,dout,ids),flush=True)
    except Exception as e: print(rows,w,stg,str(e)[:300],flush=True)
dense=functools.partial(jax.nn.dot_product_attention,is_causal=True,implementation="cudnn")
print('dense fwd',t(dense,q,k,v)); print('dense both',t(with_gradients(dense),q,k,v,dout),flush=True)
