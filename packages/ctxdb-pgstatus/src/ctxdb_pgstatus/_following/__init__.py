"""What `follow_master` and `follow_replica` do with each engine: `engine` takes and leaves connections, `driver` asks
drivers, `statements` tells which statements may write, and `positions` knows what the running code has written.
"""
