"""Every method from the same start, on the same pairs, prompts and measurements: the reward-KL frontier.

A comparison's folder (`frontier.output_dir`):

    recipe.yaml          the resolved recipe
    sources.json         digests of the files that it names
    start/               sft/model, pairs/train.jsonl heldout.jsonl prompts.jsonl (see `dpo_kit.start`)
    reward_model/        a run folder: the reward model learned from the pairs
    runs/NAME/           a run folder for each method, setting and seed
    runs/NAME.yaml       its recipe, an ordinary one; runs/NAME.log what the run said
    reference/           the cached log-probs that the runs share; reference.json what they took
    runs.csv             how each run ended
    frontier.csv         method, setting, seed, step, reward, kl, seconds, tokens
    matched.csv          reward of each method at matched KL, with bootstrap intervals
    costs.csv            what each method takes
    frontier.png  convergence.png  frontier.html
"""
