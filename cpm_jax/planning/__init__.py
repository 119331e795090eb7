"""What a pod would do: ahead-of-time compilation for TPUs that are not there, and the arithmetic around it."""
