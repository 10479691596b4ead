"""A visit on several devices of one machine: one process each, with the base in it.

The first process, rank 0, is the site's: it holds message, examples, adapter and optimizer, and
only it decides. The others get the adapter and examples, and return gradients and losses.

A batch is divided into shares, as many as `train.devices` says. Each share's gradient is added in
the order of the shares, so that the sum has the bits of one process that accumulates over the same
shares. An all-reduce, as in DistributedDataParallel and accelerate, adds in an order of its own,
and needs a whole visit in each process.
"""
