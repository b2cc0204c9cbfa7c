"""Which method for my case? Several methods, several seeds, one report with intervals; and advice without a run."""
