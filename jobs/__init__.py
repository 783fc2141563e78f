"""Ray entry points: `python -m jobs.<job>` is `unetpp <job>` is what a cluster runs."""
