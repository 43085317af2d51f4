"""``kdcache sweep``: many students from one cache or a few."""
