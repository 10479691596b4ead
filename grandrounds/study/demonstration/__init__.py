"""Common and rare facts against ε: the rehearsal behind `grandrounds privacy demo`."""
