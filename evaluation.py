"""The original project's command: python evaluation.py --data_root R --ks 1 10 50 --pretrained_clip_path P …"""

from cytoclip.cli import original_evaluation

if __name__ == "__main__":
    original_evaluation()
