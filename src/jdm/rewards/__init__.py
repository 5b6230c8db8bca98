"""Rewards: how good a picture is for its prompt, and the judges that check what climbing them did."""

from jdm.rewards.base import Reward, checked_reward, load_reward, reward_name
from jdm.rewards.classifier import PromptClassifier

__all__ = ["PromptClassifier", "Reward", "checked_reward", "load_reward", "reward_name"]
