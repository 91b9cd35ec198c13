"""Ray: worker groups, the broker between them and the driver, the cluster itself.

The lowest folder that imports Ray. Begin with `worker_pool.py`.
"""
