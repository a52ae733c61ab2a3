"""The report of a run: one HTML file, and one picture of it.

metrics.jsonl, config.json, rollouts/, diagnosis.json -> records -> charts, gallery, diagnosis -> page -> report.html
                                                                 \\-> picture -> PNG
"""

from rlpr_jax.report.page import write_report as write_report
from rlpr_jax.report.picture import save_picture as save_picture
