"""Attacks: what an unlearned model gives away to somebody who does more than ask politely.

Every attack needs its control. Retrained models relearn too, sampling finds the right answer now
and then by luck, and a guided decoder can be led anywhere: a number of one of these attacks says
something only beside the same number of a model that never saw the data.
"""
