# SPDX-License-Identifier: Apache-2.0
# How often each labelled set is drawn: TASK_WEIGHTS, for the scripts that read this.
# shellcheck shell=sh disable=SC2034
# The embedded model's.
first="{'imdb': 0.45, 'opinion_words': 0.10, 'customer_reviews': 0.08, 'vader_amazon': 0.06,
  'vader_tweets': 0.05, 'vader_nyt': 0.04, 'snli': 0.06, 'sarcasm': 0.05, 'bbc': 0.04,
  'spam': 0.02, 'mrpc': 0.02, 'pan': 0.02, 'rte': 0.01}"
# With GLUE, SuperGLUE and prompted rows beside them.
suites="{'imdb': 0.1, 'opinion_words': 0.02, 'customer_reviews': 0.05, 'vader_amazon': 0.04,
  'vader_tweets': 0.05, 'vader_nyt': 0.04, 'snli': 0.06, 'mnli': 0.09, 'qnli': 0.08,
  'qqp': 0.08, 'sarcasm': 0.05, 'bbc': 0.06, 'spam': 0.03, 'mrpc': 0.03, 'pan': 0.03,
  'rte': 0.02, 'boolq': 0.05, 'cb': 0.01, 'copa': 0.01, 'prompted': 0.1}"
# The same with more sentiment, which short texts of every kind ask for most: the family's.
# Sentences of film reviews by themselves are what `opinions.py` made of the teacher's vectors.
family="{'imdb': 0.1, 'film_sentences': 0.25, 'opinion_words': 0.03, 'customer_reviews': 0.05,
  'vader_amazon': 0.04, 'vader_tweets': 0.04, 'vader_nyt': 0.03, 'snli': 0.05, 'mnli': 0.08,
  'qnli': 0.06, 'qqp': 0.07, 'sarcasm': 0.04, 'bbc': 0.05, 'spam': 0.02, 'mrpc': 0.03,
  'pan': 0.03, 'rte': 0.02, 'boolq': 0.04, 'cb': 0.01, 'copa': 0.01, 'prompted': 0.1}"
