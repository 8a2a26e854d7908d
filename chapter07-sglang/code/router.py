"""x"""
import asyncio, uvloop, sys
from llm_router.balancer import Router, Settings
from llm_router.client import Client
from llm_router.health import Watch
from llm_router.policies import make_policy
from llm_router.worker import Worker
import gc
async def go():
    gc.collect(); gc.freeze(); gc.set_threshold(50_000, 20, 50)
    router = Router(make_policy(sys.argv[1], None))
    for url in sys.argv[3:]: router.add(Worker(url))
    watch = Watch(router)
    server = await asyncio.get_running_loop().create_server(lambda: Client(router), "127.0.0.1", int(sys.argv[2]), backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()
uvloop.run(go())
