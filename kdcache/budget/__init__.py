"""``kdcache plan``: what a dump and the students after it will take, said before anything is spent."""
