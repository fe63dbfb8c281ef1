"""Many runs of one experiment, with some of its options varied: what to try, what to measure, how to compare."""
