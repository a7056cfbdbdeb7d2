"""What an engine on one host of a cluster does when the cluster moves on."""
