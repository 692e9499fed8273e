"""The curve: visual tokens in; time, memory and agreement with all of them out."""
