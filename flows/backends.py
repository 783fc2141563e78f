"""Where jobs run: one backend for each place, made once a process."""

import functools
import os

from flows.jobs_api import RayJobs
from flows.local_jobs import LocalJobs
from flows.ray_jobs import JobBackend
from unetpp.errors import ConfigError


@functools.cache
def backend_of(place: str) -> JobBackend:
    """The backend for a `jobs` option. ConfigError where its address is missing."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    match "ray" if place == "auto" and address else place:
        case "ray":
            if not address:
                raise ConfigError("jobs is `ray`, but RAY_API_SERVER_ADDRESS is not set: the dashboard's address")
            return RayJobs(address)
        case "kuberay":
            from flows.kuberay import KubeRayJobs

            return KubeRayJobs.from_environment()
        case _:
            return LocalJobs()
