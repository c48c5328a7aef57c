"""A whole lowered graph as a static list of kernel launches, which the driver alone replays."""
