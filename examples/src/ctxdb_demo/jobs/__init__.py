"""What the bank does outside of requests: a script, a worker on a queue in the database, tasks of a broker."""
